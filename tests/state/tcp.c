/* TCP: sockets that listen, connections inside of the container, and those that lead out. */
#include "net.h"

#include <sys/epoll.h>
#include <sys/ioctl.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

/* Each case runs in a process of its own, so all share these. */
static int listener = -1, client = -1, server = -1, other = -1;
static char names[4][64];
static size_t counted;
static pid_t child;

static int tcp(const char *ip) { return MUST(socket(strchr(ip, ':') ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)); }

static void tcp_bind(int socket, const char *ip, int port)
{
	struct net_address address = net_address(ip, port);
	MUST(bind(socket, &address.any, address.bytes));
}

static int tcp_listen(const char *ip, int backlog)
{
	int socket = tcp(ip);
	tcp_bind(socket, ip, 0);
	MUST(listen(socket, backlog));
	return socket;
}

static void tcp_dial(int socket, const char *ip, int port)
{
	struct net_address address = net_address(ip, port);
	MUST(connect(socket, &address.any, address.bytes));
}

/* listener, client and server, all connected at `ip`. */
static void tcp_connect_at(const char *ip)
{
	listener = tcp_listen(ip, 8);
	client = tcp(ip);
	tcp_dial(client, ip, net_port(listener));
	server = MUST(accept(listener, NULL, NULL));
	snprintf(names[0], sizeof names[0], "%s", net_name(client));
	snprintf(names[1], sizeof names[1], "%s", net_name(server));
}

static void tcp_expect_names(void)
{
	CHECK(!strcmp(net_name(client), names[0]), "the client is %s, was %s", net_name(client), names[0]);
	CHECK(!strcmp(net_peer(server), names[0]), "the server's peer is %s, was %s", net_peer(server), names[0]);
	CHECK(!strcmp(net_name(server), names[1]), "the server is %s, was %s", net_name(server), names[1]);
	CHECK(!strcmp(net_peer(client), names[1]), "the client's peer is %s, was %s", net_peer(client), names[1]);
}

/* Data goes both ways, and nothing else is there before it. */
static void tcp_expect_talk(void)
{
	net_send(client, 11, 100000);
	net_expect(server, 11, 100000);
	net_send(server, 12, 100000);
	net_expect(client, 12, 100000);
	net_expect_nothing(client);
	net_expect_nothing(server);
}

static void tcp_expect_service(const char *ip, int port)
{
	int new = tcp(ip);
	tcp_dial(new, ip, port);
	int accepted = MUST(accept(listener, NULL, NULL));
	net_send(new, 5, 1000);
	net_expect(accepted, 5, 1000);
	close(new);
	net_expect_end(accepted);
	close(accepted);
}

static void tcp_spoil_client(void) { net_send(client, 77, 1); }
static void tcp_spoil_server(void) { net_send(server, 77, 1); }
static void tcp_spoil_close(void) { MUST(close(listener)); }

/* Sockets that were never connected. */

static void tcp_fresh_setup(void)
{
	client = tcp("127.0.0.1");
	net_set(client, IPPROTO_TCP, TCP_NODELAY, 1);
	net_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
	net_set(client, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	net_set(client, IPPROTO_TCP, TCP_MAXSEG, 1000);
	net_set(client, IPPROTO_TCP, TCP_SYNCNT, 3);
	net_set(client, IPPROTO_IP, IP_TOS, 16);
	net_set(client, SOL_SOCKET, SO_SNDBUF, 30000);
}
static void tcp_fresh_check(void)
{
	CHECK(net_option(client, IPPROTO_TCP, TCP_NODELAY) == 1 && net_option(client, SOL_SOCKET, SO_KEEPALIVE) == 1, "flags");
	CHECK(net_option(client, IPPROTO_TCP, TCP_KEEPIDLE) == 77, "TCP_KEEPIDLE");
	CHECK(net_option(client, IPPROTO_TCP, TCP_MAXSEG) == 1000, "TCP_MAXSEG");
	CHECK(net_option(client, IPPROTO_TCP, TCP_SYNCNT) == 3, "TCP_SYNCNT");
	CHECK(net_option(client, IPPROTO_IP, IP_TOS) == 16, "IP_TOS");
	CHECK(net_option(client, SOL_SOCKET, SO_SNDBUF) == 60000, "SO_SNDBUF");
	CHECK(net_events(client) == (POLLOUT | POLLHUP), "events %#x", net_events(client));
	listener = tcp_listen("127.0.0.1", 3);
	tcp_expect_service("127.0.0.1", net_port(listener));
	tcp_dial(client, "127.0.0.1", net_port(listener));
}
static void tcp_fresh_spoil(void) { net_set(client, IPPROTO_TCP, TCP_NODELAY, 0); }
STATE(tcp_fresh)

static void tcp_bound_setup(void)
{
	listener = tcp("127.0.0.1");
	tcp_bind(listener, "127.0.0.1", 0);
	snprintf(names[0], sizeof names[0], "%s", net_name(listener));
}
static void tcp_bound_check(void)
{
	CHECK(!strcmp(net_name(listener), names[0]), "it is %s, was %s", net_name(listener), names[0]);
	int rival = tcp("127.0.0.1");
	net_set(rival, SOL_SOCKET, SO_REUSEADDR, 1);
	struct net_address address = net_address("127.0.0.1", net_port(listener));
	CHECK(bind(rival, &address.any, address.bytes) == -1 && errno == EADDRINUSE, "somebody else gets its address");
	MUST(listen(listener, 3));
	tcp_expect_service("127.0.0.1", net_port(listener));
}
static void tcp_bound_spoil(void)
{
	MUST(close(listener));
	listener = tcp("127.0.0.1");
}
STATE(tcp_bound)

static void tcp_bound_reuse_setup(void)
{
	listener = tcp("0.0.0.0");
	net_set(listener, SOL_SOCKET, SO_REUSEADDR, 1);
	tcp_bind(listener, "0.0.0.0", 7100);
	other = tcp("0.0.0.0");
	net_set(other, SOL_SOCKET, SO_REUSEADDR, 1);
	tcp_bind(other, "0.0.0.0", 7100);
	MUST(listen(listener, 4));
}
static void tcp_bound_reuse_check(void)
{
	CHECK(net_port(other) == 7100 && net_port(listener) == 7100, "ports");
	CHECK(net_option(other, SOL_SOCKET, SO_REUSEADDR) == 1, "SO_REUSEADDR");
	CHECK(listen(other, 4) == -1 && errno == EADDRINUSE, "both listen");
	tcp_expect_service("127.0.0.1", 7100);
}
static void tcp_bound_reuse_spoil(void) { tcp_spoil_close(); }
STATE(tcp_bound_reuse)

/* Listening. */

static void tcp_listen_any_setup(void) { listener = tcp_listen("0.0.0.0", 17); counted = (size_t)net_port(listener); }
static void tcp_listen_any_check(void)
{
	struct tcp_info info;
	socklen_t bytes = sizeof info;
	MUST(getsockopt(listener, IPPROTO_TCP, TCP_INFO, &info, &bytes));
	CHECK(info.tcpi_sacked == 17, "the backlog is %u", info.tcpi_sacked);
	CHECK(net_option(listener, SOL_SOCKET, SO_ACCEPTCONN) == 1, "it does not listen");
	CHECK(net_option(listener, SOL_SOCKET, SO_REUSEADDR) == 0, "SO_REUSEADDR");
	int rival = tcp("0.0.0.0");
	net_set(rival, SOL_SOCKET, SO_REUSEADDR, 1);
	struct net_address address = net_address("0.0.0.0", (int)counted);
	CHECK(bind(rival, &address.any, address.bytes) == -1 && errno == EADDRINUSE, "somebody else gets its address");
	tcp_expect_service("127.0.0.1", (int)counted);
	tcp_expect_service("127.1.2.3", (int)counted);
}
static void tcp_listen_any_spoil(void) { tcp_spoil_close(); }
STATE(tcp_listen_any)

static void tcp_listen_one_setup(void) { listener = tcp_listen("127.0.0.5", 1); counted = (size_t)net_port(listener); }
static void tcp_listen_one_check(void)
{
	struct net_address address = net_address("127.0.0.1", (int)counted);
	int stranger = tcp("127.0.0.1");
	CHECK(connect(stranger, &address.any, address.bytes) == -1 && errno == ECONNREFUSED, "it listens elsewhere");
	tcp_expect_service("127.0.0.5", (int)counted);
}
static void tcp_listen_one_spoil(void) { tcp_spoil_close(); }
STATE(tcp_listen_one)

static void tcp_listen_v6_setup(void)
{
	listener = tcp("::");
	net_set(listener, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	tcp_bind(listener, "::", 7200);
	MUST(listen(listener, 5));
	/* The other half of the same port. */
	other = tcp("0.0.0.0");
	tcp_bind(other, "0.0.0.0", 7200);
	MUST(listen(other, 5));
}
static void tcp_listen_v6_check(void)
{
	tcp_expect_service("::1", 7200);
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", 7200);
	server = MUST(accept(other, NULL, NULL));
	tcp_expect_talk();
}
static void tcp_listen_v6_spoil(void) { tcp_spoil_close(); }
STATE(tcp_listen_v6)

static void tcp_listen_dual_setup(void)
{
	listener = tcp("::");
	net_set(listener, IPPROTO_IPV6, IPV6_V6ONLY, 0);
	tcp_bind(listener, "::", 7300);
	MUST(listen(listener, 5));
}
static void tcp_listen_dual_check(void)
{
	tcp_expect_service("::1", 7300);
	tcp_expect_service("127.0.0.1", 7300);
}
static void tcp_listen_dual_spoil(void) { tcp_spoil_close(); }
STATE(tcp_listen_dual)

static void tcp_listen_reuseport_setup(void)
{
	for (int i = 0; i < 2; i++) {
		int socket = tcp("127.0.0.1");
		net_set(socket, SOL_SOCKET, SO_REUSEPORT, 1);
		tcp_bind(socket, "127.0.0.1", 7400);
		MUST(listen(socket, 64));
		*(i ? &other : &listener) = socket;
	}
}
static void tcp_listen_reuseport_check(void)
{
	int counts[2] = {0, 0};
	for (int i = 0; i < 60; i++) {
		client = tcp("127.0.0.1");
		tcp_dial(client, "127.0.0.1", 7400);
		struct pollfd fds[2] = {{listener, POLLIN, 0}, {other, POLLIN, 0}};
		CHECK(poll(fds, 2, 5000) == 1, "nobody accepts");
		counts[fds[1].revents != 0]++;
		close(MUST(accept(fds[1].revents ? other : listener, NULL, NULL)));
		close(client);
	}
	CHECK(counts[0] && counts[1], "one takes all: %d and %d", counts[0], counts[1]);
	int third = tcp("127.0.0.1");
	net_set(third, SOL_SOCKET, SO_REUSEPORT, 1);
	tcp_bind(third, "127.0.0.1", 7400);
}
static void tcp_listen_reuseport_spoil(void)
{
	MUST(close(other));
	other = tcp_listen("127.0.0.1", 4);
}
STATE(tcp_listen_reuseport)

/* Both listen, and one has taken back that it lets others. */
static void tcp_listen_reuseport_off_setup(void) { tcp_listen_reuseport_setup(); net_set(other, SOL_SOCKET, SO_REUSEPORT, 0); }
static void tcp_listen_reuseport_off_check(void)
{
	CHECK(net_option(listener, SOL_SOCKET, SO_REUSEPORT) == 1 && net_option(other, SOL_SOCKET, SO_REUSEPORT) == 0, "SO_REUSEPORT");
	struct pollfd fds[2] = {{listener, POLLIN, 0}, {other, POLLIN, 0}};
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", 7400);
	CHECK(poll(fds, 2, 5000) == 1, "nobody accepts");
}
static void tcp_listen_reuseport_off_spoil(void) { net_set(other, SOL_SOCKET, SO_REUSEPORT, 1); }
STATE(tcp_listen_reuseport_off)

static void tcp_listen_options_setup(void)
{
	listener = tcp("127.0.0.1");
	net_set(listener, SOL_SOCKET, SO_RCVBUF, 20000);
	net_set(listener, IPPROTO_TCP, TCP_DEFER_ACCEPT, 3);
	net_set(listener, IPPROTO_TCP, TCP_FASTOPEN, 5);
	net_set(listener, IPPROTO_TCP, TCP_NODELAY, 1);
	net_set(listener, IPPROTO_TCP, TCP_SAVE_SYN, 1);
	net_set(listener, IPPROTO_IP, IP_TTL, 33);
	tcp_bind(listener, "127.0.0.1", 0);
	MUST(listen(listener, 5));
	counted = (size_t)net_option(listener, IPPROTO_TCP, TCP_DEFER_ACCEPT);
}
static void tcp_listen_options_check(void)
{
	CHECK(net_option(listener, IPPROTO_TCP, TCP_DEFER_ACCEPT) == (int)counted, "TCP_DEFER_ACCEPT");
	CHECK(net_option(listener, IPPROTO_TCP, TCP_FASTOPEN) == 5, "TCP_FASTOPEN");
	CHECK(net_option(listener, IPPROTO_TCP, TCP_SAVE_SYN) == 1, "TCP_SAVE_SYN");
	CHECK(net_option(listener, IPPROTO_IP, IP_TTL) == 33, "IP_TTL");
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", net_port(listener));
	net_send(client, 3, 100);
	server = MUST(accept(listener, NULL, NULL));
	net_expect(server, 3, 100);
	CHECK(net_option(server, IPPROTO_TCP, TCP_NODELAY) == 1, "accepted sockets do not inherit");
	CHECK(net_option(server, SOL_SOCKET, SO_RCVBUF) == 40000, "SO_RCVBUF");
}
static void tcp_listen_options_spoil(void) { net_set(listener, IPPROTO_TCP, TCP_FASTOPEN, 6); }
STATE(tcp_listen_options)

static void tcp_listen_multipath_setup(void)
{
	listener = MUST(socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP));
	tcp_bind(listener, "0.0.0.0", 7500);
	MUST(listen(listener, 9));
}
static void tcp_listen_multipath_check(void)
{
	CHECK(net_option(listener, SOL_SOCKET, SO_PROTOCOL) == IPPROTO_MPTCP, "SO_PROTOCOL");
	tcp_expect_service("127.0.0.1", 7500);
}
static void tcp_listen_multipath_spoil(void) { tcp_spoil_close(); }
STATE(tcp_listen_multipath)

/* Established connections. */

#define TCP_PAIR(id, ip) \
	static void id##_setup(void) { tcp_connect_at(ip); } \
	static void id##_check(void) \
	{ \
		tcp_expect_names(); \
		tcp_expect_talk(); \
		tcp_expect_service(ip, net_port(listener)); \
		CHECK(!net_option(listener, SOL_SOCKET, SO_REUSEADDR) && !net_option(client, SOL_SOCKET, SO_REUSEADDR), "SO_REUSEADDR"); \
	} \
	static void id##_spoil(void) { tcp_spoil_client(); } \
	STATE(id)
TCP_PAIR(tcp_pair_v4, "127.0.0.1")
TCP_PAIR(tcp_pair_v6, "::1")
TCP_PAIR(tcp_pair_mapped, "::ffff:127.0.0.1")

static void tcp_pair_dual_setup(void)
{
	listener = tcp("::");
	tcp_bind(listener, "::", 7600);
	MUST(listen(listener, 5));
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", 7600);
	server = MUST(accept(listener, NULL, NULL));
	snprintf(names[0], sizeof names[0], "%s", net_peer(server));
	net_send(client, 1, 10);
}
static void tcp_pair_dual_check(void)
{
	CHECK(!strcmp(net_peer(server), names[0]), "the peer is %s, was %s", net_peer(server), names[0]);
	net_expect(server, 1, 10);
	tcp_expect_talk();
	tcp_expect_service("::1", 7600);
}
static void tcp_pair_dual_spoil(void) { tcp_spoil_client(); }
STATE(tcp_pair_dual)

static void tcp_pair_no_listener_setup(void) { tcp_connect_at("127.0.0.1"); MUST(close(listener)); }
static void tcp_pair_no_listener_check(void) { tcp_expect_names(); tcp_expect_talk(); }
static void tcp_pair_no_listener_spoil(void) { tcp_spoil_server(); }
STATE(tcp_pair_no_listener)

static void tcp_pair_bound_client_setup(void)
{
	listener = tcp_listen("127.0.0.1", 5);
	client = tcp("127.0.0.1");
	tcp_bind(client, "127.0.0.9", 7700);
	tcp_dial(client, "127.0.0.1", net_port(listener));
	server = MUST(accept(listener, NULL, NULL));
}
static void tcp_pair_bound_client_check(void)
{
	CHECK(!strcmp(net_peer(server), "127.0.0.9 7700"), "the peer is %s", net_peer(server));
	tcp_expect_talk();
}
static void tcp_pair_bound_client_spoil(void) { tcp_spoil_client(); }
STATE(tcp_pair_bound_client)

static void tcp_pair_queues_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_send(client, 100, 40000);
	net_send(server, 200, 50001);
}
static void tcp_pair_queues_check(void)
{
	int count = 0;
	MUST(ioctl(server, FIONREAD, &count));
	CHECK(count == 40000, "%d bytes can be read", count);
	net_expect(server, 100, 40000);
	net_expect(client, 200, 50001);
	tcp_expect_talk();
}
static void tcp_pair_queues_spoil(void) { tcp_spoil_client(); }
STATE(tcp_pair_queues)

static void tcp_pair_one_byte_setup(void)
{
	tcp_connect_at("::1");
	net_send(client, 9, 1);
	usleep(60000);
	net_send(client, 10, 1);
}
static void tcp_pair_one_byte_check(void)
{
	net_expect(server, 9, 2);
	tcp_expect_talk();
}
static void tcp_pair_one_byte_spoil(void) { tcp_spoil_server(); }
STATE(tcp_pair_one_byte)

/* Sends until nothing more fits; the receiver reads nothing. */
static void tcp_stuff(int from, unsigned begin)
{
	int flags = MUST(fcntl(from, F_GETFL));
	MUST(fcntl(from, F_SETFL, flags | O_NONBLOCK));
	unsigned char buffer[4096];
	for (int idle = 0; idle < 20;) {
		for (size_t i = 0; i < sizeof buffer; i++)
			buffer[i] = (unsigned char)((begin + counted + i) * 2654435761u >> 24);
		ssize_t sent = send(from, buffer, sizeof buffer, MSG_NOSIGNAL);
		if (sent > 0) {
			counted += (size_t)sent;
			idle = 0;
		} else {
			CHECK(errno == EAGAIN, "send");
			idle++;
			usleep(5000);
		}
	}
	MUST(fcntl(from, F_SETFL, flags));
}

static void tcp_pair_full_setup(void) { tcp_connect_at("127.0.0.1"); tcp_stuff(client, 0); }
static void tcp_pair_full_check(void)
{
	CHECK(!(net_events(client) & POLLOUT), "there is room");
	net_expect(server, 0, counted);
	tcp_expect_talk();
}
static void tcp_pair_full_spoil(void)
{
	char byte;
	MUST(read(server, &byte, 1));
}
STATE(tcp_pair_full)

static void tcp_pair_full_small_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_set(server, SOL_SOCKET, SO_SNDBUF, 6000);
	net_set(client, SOL_SOCKET, SO_RCVBUF, 5000);
	tcp_stuff(server, 0);
	MUST(shutdown(server, SHUT_WR));
}
static void tcp_pair_full_small_check(void)
{
	CHECK(net_option(client, SOL_SOCKET, SO_RCVBUF) == 10000 && net_option(server, SOL_SOCKET, SO_SNDBUF) == 12000, "buffers");
	net_expect(client, 0, counted);
	net_expect_end(client);
	net_send(client, 4, 2000);
	net_expect(server, 4, 2000);
}
static void tcp_pair_full_small_spoil(void)
{
	char byte;
	MUST(read(client, &byte, 1));
}
STATE(tcp_pair_full_small)

static void tcp_pair_full_both_setup(void)
{
	tcp_connect_at("::1");
	tcp_stuff(client, 0);
	size_t first = counted;
	counted = 0;
	tcp_stuff(server, 1000);
	snprintf(names[2], sizeof names[2], "%zu", first);
}
static void tcp_pair_full_both_check(void)
{
	net_expect(server, 0, (size_t)atoll(names[2]));
	net_expect(client, 1000, counted);
	tcp_expect_talk();
}
static void tcp_pair_full_both_spoil(void)
{
	char byte;
	MUST(read(client, &byte, 1));
}
STATE(tcp_pair_full_both)

static void tcp_pair_corked_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_set(client, IPPROTO_TCP, TCP_CORK, 1);
	net_send(client, 30, 100);
}
static void tcp_pair_corked_check(void)
{
	CHECK(net_option(client, IPPROTO_TCP, TCP_CORK) == 1, "TCP_CORK");
	net_set(client, IPPROTO_TCP, TCP_CORK, 0);
	net_expect(server, 30, 100);
	tcp_expect_talk();
}
static void tcp_pair_corked_spoil(void) { net_set(client, IPPROTO_TCP, TCP_CORK, 0); }
STATE(tcp_pair_corked)

static void tcp_client_finished_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_send(client, 50, 300);
	MUST(shutdown(client, SHUT_WR));
}
static void tcp_client_finished_check(void)
{
	CHECK(net_events(server) & POLLRDHUP, "the end is missing");
	CHECK(send(client, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it sends again");
	net_expect(server, 50, 300);
	net_expect_end(server);
	net_send(server, 60, 70000);
	net_expect(client, 60, 70000);
	MUST(close(server));
	net_expect_end(client);
	tcp_expect_service("127.0.0.1", net_port(listener));
}
static void tcp_client_finished_spoil(void) { tcp_spoil_server(); }
STATE(tcp_client_finished)

static void tcp_server_finished_setup(void)
{
	tcp_connect_at("::1");
	net_send(client, 70, 10);
	MUST(shutdown(server, SHUT_WR));
}
static void tcp_server_finished_check(void)
{
	tcp_expect_names();
	net_expect_end(client);
	net_send(client, 80, 1000);
	net_expect(server, 70, 10);
	net_expect(server, 80, 1000);
	CHECK(send(server, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it sends again");
}
static void tcp_server_finished_spoil(void) { tcp_spoil_client(); }
STATE(tcp_server_finished)

static void tcp_read_shut_setup(void) { tcp_connect_at("127.0.0.1"); MUST(shutdown(client, SHUT_RD)); }
static void tcp_read_shut_check(void)
{
	CHECK(net_events(client) & POLLRDHUP, "events %#x", net_events(client));
	net_expect_end(client);
	net_send(client, 2, 100);
	net_expect(server, 2, 100);
}
static void tcp_read_shut_spoil(void) { tcp_spoil_server(); }
STATE(tcp_read_shut)

static void tcp_peer_closed_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_send(server, 40, 5000);
	MUST(close(server));
}
static void tcp_peer_closed_check(void)
{
	CHECK(!strcmp(net_name(client), names[0]) && !strcmp(net_peer(client), names[1]), "it is %s, its peer %s", net_name(client), net_peer(client));
	net_expect(client, 40, 5000);
	net_expect_end(client);
	ssize_t sent = send(client, "x", 1, MSG_NOSIGNAL);
	usleep(1000);
	CHECK(sent == 1 && send(client, "x", 1, MSG_NOSIGNAL) == -1, "somebody takes what it sends");
	tcp_expect_service("127.0.0.1", net_port(listener));
}
static void tcp_peer_closed_spoil(void)
{
	char byte;
	MUST(read(client, &byte, 1));
}
STATE(tcp_peer_closed)

static void tcp_both_finished_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_send(client, 90, 500);
	MUST(shutdown(client, SHUT_WR));
	MUST(shutdown(server, SHUT_WR));
	usleep(1000);
}
static void tcp_both_finished_check(void)
{
	int closed = POLLIN | POLLOUT | POLLHUP | POLLRDHUP;
	CHECK(net_events(client) == closed && net_events(server) == closed, "events %#x and %#x", net_events(client), net_events(server));
	net_expect(server, 90, 500);
	net_expect_end(server);
	net_expect_end(client);
	CHECK(!strcmp(net_peer(client), "none"), "it has a peer");
	CHECK(send(client, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it sends");
	tcp_expect_service("127.0.0.1", net_port(listener));
}
static void tcp_both_finished_spoil(void)
{
	char byte;
	MUST(read(server, &byte, 1));
}
STATE(tcp_both_finished)

static void tcp_was_reset_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_send(server, 15, 30);
	struct linger now = {1, 0};
	MUST(setsockopt(server, SOL_SOCKET, SO_LINGER, &now, sizeof now));
	MUST(close(server));
}
static void tcp_was_reset_check(void)
{
	char byte;
	CHECK(net_events(client) == (POLLIN | POLLOUT | POLLHUP | POLLRDHUP | POLLERR), "events %#x", net_events(client));
	net_expect(client, 15, 30);
	CHECK(recv(client, &byte, 1, 0) == -1 && errno == ECONNRESET, "it was not reset");
	net_expect_end(client);
}
static void tcp_was_reset_spoil(void) { net_option(client, SOL_SOCKET, SO_ERROR); }
STATE(tcp_was_reset)

/* Whom a socket was connected to: told without a connection too. */
static const char *tcp_last_peer(int socket)
{
	bool is_v6 = net_option(socket, SOL_SOCKET, SO_DOMAIN) == AF_INET6;
	struct net_address address = {.bytes = is_v6 ? sizeof address.v6 : sizeof address.v4};
	if (getsockopt(socket, SOL_SOCKET, SO_PEERNAME, &address.any, &address.bytes))
		return "none";
	return net_text(&address);
}

/* Addresses that ended connections still tell, and whose ports others have meanwhile. */
static char ended_names[2][2][64];
static int ended_ends[2][2];
static void tcp_ended_names_setup(void)
{
	for (int i = 0; i < 2; i++) {
		tcp_connect_at(i ? "::1" : "127.0.0.2");
		MUST(shutdown(client, SHUT_WR));
		MUST(shutdown(server, SHUT_WR));
		usleep(1000);
		ended_ends[i][0] = client;
		ended_ends[i][1] = server;
		snprintf(ended_names[i][0], sizeof ended_names[i][0], "%s", net_name(client));
		snprintf(ended_names[i][1], sizeof ended_names[i][1], "%s", net_name(server));
	}
}
static void tcp_ended_names_check(void)
{
	for (int i = 0; i < 2; i++)
		for (int end = 0; end < 2; end++) {
			int socket = ended_ends[i][end];
			CHECK(!strcmp(net_name(socket), ended_names[i][end]), "it is %s, was %s", net_name(socket), ended_names[i][end]);
			CHECK(!strcmp(tcp_last_peer(socket), ended_names[i][!end]), "its peer was %s, is %s", ended_names[i][!end], tcp_last_peer(socket));
			CHECK(!strcmp(net_peer(socket), "none"), "it is connected");
			net_expect_end(socket);
			CHECK(net_option(socket, SOL_SOCKET, SO_ERROR) == 0, "it has an error");
			CHECK(send(socket, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it sends");
		}
	/* It was never bound, which would have changed that. */
	CHECK(net_option(ended_ends[1][0], IPPROTO_IPV6, IPV6_V6ONLY) == 0, "it is for IPv6 only");
	/* Its port is free for others. */
	int other = tcp("127.0.0.2");
	int port = atoi(strchr(ended_names[0][0], ' ') + 1);
	struct net_address address = net_address("127.0.0.2", port);
	int one = 1;
	MUST(setsockopt(other, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
	CHECK(bind(other, &address.any, address.bytes) == 0, "its port is taken");
	tcp_expect_service("::1", net_port(listener));
}
static void tcp_ended_names_spoil(void)
{
	int socket = tcp("127.0.0.2");
	MUST(dup2(socket, ended_ends[0][1]));
}
STATE(tcp_ended_names)

static void tcp_was_refused_setup(void)
{
	client = MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
	struct net_address address = net_address("127.0.0.1", 1);
	CHECK(connect(client, &address.any, address.bytes) == -1, "somebody listens");
}
static void tcp_was_refused_check(void)
{
	CHECK(net_events(client) & POLLERR, "events %#x", net_events(client));
	CHECK(!strcmp(tcp_last_peer(client), "127.0.0.1 1"), "its peer was %s", tcp_last_peer(client));
	CHECK(net_option(client, SOL_SOCKET, SO_ERROR) == ECONNREFUSED, "the error is another");
	CHECK(fcntl(client, F_GETFL) & O_NONBLOCK, "it waits");
}
static void tcp_was_refused_spoil(void) { net_option(client, SOL_SOCKET, SO_ERROR); }
STATE(tcp_was_refused)

static void tcp_self_setup(void)
{
	client = tcp("127.0.0.1");
	tcp_bind(client, "127.0.0.1", 7800);
	tcp_dial(client, "127.0.0.1", 7800);
	net_send(client, 33, 20);
}
static void tcp_self_check(void)
{
	CHECK(!strcmp(net_peer(client), "127.0.0.1 7800"), "its peer is %s", net_peer(client));
	net_expect(client, 33, 20);
	net_send(client, 34, 2000);
	net_expect(client, 34, 2000);
	net_expect_nothing(client);
}
static void tcp_self_spoil(void) { tcp_spoil_client(); }
STATE(tcp_self)

#define TCP_MANY 60
static int many[TCP_MANY][2];
static void tcp_many_setup(void)
{
	listener = tcp_listen("127.0.0.1", TCP_MANY);
	for (int i = 0; i < TCP_MANY; i++) {
		many[i][0] = tcp("127.0.0.1");
		tcp_dial(many[i][0], "127.0.0.1", net_port(listener));
		many[i][1] = MUST(accept(listener, NULL, NULL));
		net_send(many[i][0], (unsigned)i, (size_t)i * 100);
	}
}
static void tcp_many_check(void)
{
	for (int i = 0; i < TCP_MANY; i++) {
		client = many[i][0];
		server = many[i][1];
		net_expect(server, (unsigned)i, (size_t)i * 100);
		tcp_expect_talk();
	}
	tcp_expect_service("127.0.0.1", net_port(listener));
}
static void tcp_many_spoil(void) { net_send(many[20][0], 0, 1); }
STATE(tcp_many)

static void tcp_options_setup(void)
{
	tcp_connect_at("127.0.0.1");
	net_set(client, IPPROTO_TCP, TCP_NODELAY, 1);
	net_set(client, SOL_SOCKET, SO_KEEPALIVE, 1);
	net_set(client, IPPROTO_TCP, TCP_KEEPIDLE, 100);
	net_set(client, IPPROTO_TCP, TCP_KEEPINTVL, 20);
	net_set(client, IPPROTO_TCP, TCP_KEEPCNT, 4);
	net_set(client, IPPROTO_TCP, TCP_USER_TIMEOUT, 34567);
	net_set(client, IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16384);
	net_set(client, IPPROTO_TCP, TCP_LINGER2, 30);
	net_set(client, IPPROTO_TCP, TCP_WINDOW_CLAMP, 30000);
	net_set(client, SOL_SOCKET, SO_PRIORITY, 5);
	net_set(client, SOL_SOCKET, SO_RCVLOWAT, 4);
	net_set(client, SOL_SOCKET, SO_OOBINLINE, 1);
	struct linger wait = {1, 12};
	MUST(setsockopt(server, SOL_SOCKET, SO_LINGER, &wait, sizeof wait));
	struct timeval limit = {3, 500000};
	MUST(setsockopt(server, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
	MUST(setsockopt(server, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
}
static void tcp_options_check(void)
{
	static const int wanted[][3] = {
		{IPPROTO_TCP, TCP_NODELAY, 1}, {SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, 100},
		{IPPROTO_TCP, TCP_KEEPINTVL, 20}, {IPPROTO_TCP, TCP_KEEPCNT, 4}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 34567},
		{IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16384}, {IPPROTO_TCP, TCP_LINGER2, 30}, {IPPROTO_TCP, TCP_WINDOW_CLAMP, 30000},
		{SOL_SOCKET, SO_PRIORITY, 5}, {SOL_SOCKET, SO_RCVLOWAT, 4}, {SOL_SOCKET, SO_OOBINLINE, 1},
	};
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		CHECK(net_option(client, wanted[i][0], wanted[i][1]) == wanted[i][2], "option %d of level %d is %d", wanted[i][1], wanted[i][0], net_option(client, wanted[i][0], wanted[i][1]));
	struct linger wait;
	struct timeval limit;
	char name[16] = "";
	socklen_t bytes = sizeof wait;
	MUST(getsockopt(server, SOL_SOCKET, SO_LINGER, &wait, &bytes));
	CHECK(wait.l_onoff && wait.l_linger == 12, "SO_LINGER");
	bytes = sizeof limit;
	MUST(getsockopt(server, SOL_SOCKET, SO_RCVTIMEO, &limit, &bytes));
	CHECK(limit.tv_sec == 3, "SO_RCVTIMEO");
	bytes = sizeof name;
	MUST(getsockopt(server, IPPROTO_TCP, TCP_CONGESTION, name, &bytes));
	CHECK(!strcmp(name, "reno"), "TCP_CONGESTION is %s", name);
	tcp_expect_names();
}
static void tcp_options_spoil(void) { net_set(client, IPPROTO_TCP, TCP_KEEPCNT, 5); }
STATE(tcp_options)

static void tcp_segments_setup(void)
{
	listener = tcp("127.0.0.1");
	net_set(listener, IPPROTO_TCP, TCP_MAXSEG, 536);
	tcp_bind(listener, "127.0.0.1", 0);
	MUST(listen(listener, 1));
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", net_port(listener));
	server = MUST(accept(listener, NULL, NULL));
	counted = (size_t)net_option(client, IPPROTO_TCP, TCP_MAXSEG);
}
static void tcp_segments_check(void)
{
	int now = net_option(client, IPPROTO_TCP, TCP_MAXSEG);
	CHECK(now == (int)counted && now <= 536, "segments of %d, not %zu", now, counted);
	tcp_expect_talk();
}
static void tcp_segments_spoil(void) { tcp_spoil_client(); }
STATE(tcp_segments)

/* Connections that nobody has accepted. */

static void tcp_waiting_setup(void)
{
	listener = tcp_listen("127.0.0.1", 5);
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", net_port(listener));
	other = tcp("127.0.0.1");
	tcp_dial(other, "127.0.0.1", net_port(listener));
	snprintf(names[0], sizeof names[0], "%s", net_name(client));
}
static void tcp_waiting_check(void)
{
	CHECK(!strcmp(net_name(client), names[0]), "it is %s, was %s", net_name(client), names[0]);
	CHECK(net_events(listener) & POLLIN, "nobody waits");
	int first = MUST(accept(listener, NULL, NULL)), second = MUST(accept(listener, NULL, NULL));
	server = strcmp(net_peer(first), names[0]) ? second : first;
	tcp_expect_talk();
	MUST(fcntl(listener, F_SETFL, O_NONBLOCK));
	CHECK(accept(listener, NULL, NULL) == -1 && errno == EAGAIN, "more wait");
}
static void tcp_waiting_spoil(void)
{
	MUST(close(MUST(accept(listener, NULL, NULL))));
	MUST(fcntl(listener, F_SETFL, O_NONBLOCK));
}
STATE(tcp_waiting)

static void tcp_waiting_finished_setup(void)
{
	listener = tcp_listen("::1", 5);
	client = tcp("::1");
	tcp_dial(client, "::1", net_port(listener));
	MUST(shutdown(client, SHUT_WR));
}
static void tcp_waiting_finished_check(void)
{
	server = MUST(accept(listener, NULL, NULL));
	net_expect_end(server);
	net_send(server, 3, 1000);
	net_expect(client, 3, 1000);
}
static void tcp_waiting_finished_spoil(void) { MUST(close(MUST(accept(listener, NULL, NULL)))); MUST(fcntl(listener, F_SETFL, O_NONBLOCK)); }
STATE(tcp_waiting_finished)

static void tcp_waiting_data_setup(void)
{
	listener = tcp_listen("127.0.0.1", 5);
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", net_port(listener));
	net_send(client, 6, 100);
}
static void tcp_waiting_data_check(void)
{
	server = MUST(accept(listener, NULL, NULL));
	net_expect(server, 6, 100);
	tcp_expect_talk();
}
static void tcp_waiting_data_spoil(void) { net_send(client, 6, 100); }
STATE(tcp_waiting_data, .refused = "that nobody has accepted")

static void tcp_connecting_setup(void)
{
	listener = tcp_listen("127.0.0.1", 0);
	other = tcp("127.0.0.1");
	tcp_dial(other, "127.0.0.1", net_port(listener));
	client = MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
	struct net_address address = net_address("127.0.0.1", net_port(listener));
	CHECK(connect(client, &address.any, address.bytes) == -1 && errno == EINPROGRESS, "it is connected");
	CHECK(!net_events(client), "there is room");
}
static void tcp_connecting_check(void)
{
	CHECK(!net_events(client), "events %#x", net_events(client));
	close(MUST(accept(listener, NULL, NULL)));
	struct pollfd fd = {.fd = client, .events = POLLOUT};
	CHECK(poll(&fd, 1, 20000) == 1 && fd.revents == POLLOUT, "events %#x", fd.revents);
	CHECK(net_option(client, SOL_SOCKET, SO_ERROR) == 0, "it failed");
	MUST(fcntl(client, F_SETFL, 0));
	server = MUST(accept(listener, NULL, NULL));
	tcp_expect_talk();
}
static void tcp_connecting_spoil(void) { tcp_spoil_close(); }
STATE(tcp_connecting)

/* Not kept. */

static void tcp_urgent_setup(void) { tcp_connect_at("127.0.0.1"); MUST(send(client, "abc", 3, MSG_OOB)); }
static void tcp_urgent_check(void)
{
	char byte;
	CHECK(recv(server, &byte, 1, MSG_OOB) == 1 && byte == 'c', "the urgent byte is missing");
}
static void tcp_urgent_spoil(void)
{
	char byte;
	MUST(recv(server, &byte, 1, MSG_OOB));
}
STATE(tcp_urgent, .refused = "urgent data")

/* Shared, and waited for. */

static int tcp_child_body(void)
{
	close(server);
	net_send(client, 21, 1000);
	until_finishing();
	net_expect(client, 22, 3000);
	net_send(client, 23, 10);
	return 0;
}
static void tcp_in_child_setup(void)
{
	tcp_connect_at("127.0.0.1");
	child = in_child(tcp_child_body);
	MUST(close(client));
}
static void tcp_in_child_check(void)
{
	net_expect(server, 21, 1000);
	net_send(server, 22, 3000);
	net_expect(server, 23, 10);
	expect_exit(child, 0);
	net_expect_end(server);
}
static void tcp_in_child_spoil(void) { tcp_spoil_server(); }
STATE(tcp_in_child)

static int tcp_shared_body(void)
{
	until_finishing();
	usleep(200000);
	net_send(client, 55, 100);
	return 0;
}
static void tcp_shared_setup(void)
{
	tcp_connect_at("127.0.0.1");
	other = MUST(dup(client));
	child = in_child(tcp_shared_body);
}
static void tcp_shared_check(void)
{
	net_set(other, IPPROTO_TCP, TCP_NODELAY, 1);
	CHECK(net_option(client, IPPROTO_TCP, TCP_NODELAY) == 1, "they are two");
	MUST(fcntl(other, F_SETFL, O_NONBLOCK));
	CHECK(fcntl(client, F_GETFL) & O_NONBLOCK, "they are two");
	MUST(fcntl(other, F_SETFL, 0));
	close(client);
	close(other);
	net_expect(server, 55, 100);
	expect_exit(child, 0);
	net_expect_end(server);
}
static void tcp_shared_spoil(void) { tcp_spoil_client(); }
STATE(tcp_shared)

static int tcp_accept_body(void)
{
	server = accept(listener, NULL, NULL);
	if (server == -1)
		return 3;
	net_expect(server, 61, 100);
	return 0;
}
static void tcp_blocked_accept_setup(void)
{
	listener = tcp_listen("127.0.0.1", 5);
	child = in_child(tcp_accept_body);
	usleep(50000);
}
static void tcp_blocked_accept_check(void)
{
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", net_port(listener));
	net_send(client, 61, 100);
	expect_exit(child, 0);
}
static void tcp_blocked_accept_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(tcp_blocked_accept)

static int tcp_receive_body(void)
{
	net_send(client, 1, 5);
	net_expect(client, 62, 100);
	net_expect_end(client);
	return 0;
}
static void tcp_blocked_receive_setup(void)
{
	tcp_connect_at("127.0.0.1");
	child = in_child(tcp_receive_body);
	usleep(50000);
}
static void tcp_blocked_receive_check(void)
{
	net_expect(server, 1, 5);
	net_send(server, 62, 100);
	MUST(shutdown(server, SHUT_WR));
	expect_exit(child, 0);
}
static void tcp_blocked_receive_spoil(void) { tcp_spoil_server(); }
STATE(tcp_blocked_receive)

static int tcp_send_body(void)
{
	net_send(client, 0, 20000000);
	return 0;
}
static void tcp_blocked_send_setup(void)
{
	tcp_connect_at("127.0.0.1");
	child = in_child(tcp_send_body);
	MUST(close(client));
	usleep(300000);
}
static void tcp_blocked_send_check(void)
{
	net_expect(server, 0, 20000000);
	expect_exit(child, 0);
	net_expect_end(server);
}
static void tcp_blocked_send_spoil(void)
{
	char byte;
	MUST(read(server, &byte, 1));
}
STATE(tcp_blocked_send)

static int tcp_connect_body(void)
{
	client = tcp("127.0.0.1");
	tcp_dial(client, "127.0.0.1", net_port(listener));
	net_send(client, 63, 100);
	return 0;
}
static void tcp_blocked_connect_setup(void)
{
	listener = tcp_listen("127.0.0.1", 0);
	other = tcp("127.0.0.1");
	tcp_dial(other, "127.0.0.1", net_port(listener));
	child = in_child(tcp_connect_body);
	usleep(50000);
}
static void tcp_blocked_connect_check(void)
{
	close(MUST(accept(listener, NULL, NULL)));
	server = MUST(accept(listener, NULL, NULL));
	net_expect(server, 63, 100);
	expect_exit(child, 0);
}
static void tcp_blocked_connect_spoil(void) { MUST(kill(child, SIGKILL)); expect_exit(child, 0); }
STATE(tcp_blocked_connect)

static int tcp_poll_body(void)
{
	struct pollfd fds[2] = {{client, POLLIN, 0}, {listener, POLLIN, 0}};
	if (poll(fds, 2, -1) != 1 || fds[1].revents != POLLIN)
		return 3;
	server = accept(listener, NULL, NULL);
	return server == -1 ? 4 : 0;
}
static void tcp_blocked_poll_setup(void)
{
	tcp_connect_at("127.0.0.1");
	child = in_child(tcp_poll_body);
	usleep(50000);
}
static void tcp_blocked_poll_check(void)
{
	other = tcp("127.0.0.1");
	tcp_dial(other, "127.0.0.1", net_port(listener));
	expect_exit(child, 0);
}
static void tcp_blocked_poll_spoil(void) { tcp_spoil_server(); }
STATE(tcp_blocked_poll)

static int epoll_fd;
static void tcp_epoll_setup(void)
{
	tcp_connect_at("127.0.0.1");
	epoll_fd = MUST(epoll_create1(0));
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 1};
	MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event));
	event.data.u64 = 2;
	event.events = EPOLLIN | EPOLLRDHUP;
	MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, server, &event));
}
static void tcp_epoll_check(void)
{
	struct epoll_event event;
	CHECK(epoll_wait(epoll_fd, &event, 1, 0) == 0, "something is due: %llu", (unsigned long long)event.data.u64);
	net_send(client, 71, 10);
	CHECK(epoll_wait(epoll_fd, &event, 1, 5000) == 1 && event.data.u64 == 2, "data is not noticed");
	net_expect(server, 71, 10);
	other = tcp("127.0.0.1");
	tcp_dial(other, "127.0.0.1", net_port(listener));
	CHECK(epoll_wait(epoll_fd, &event, 1, 5000) == 1 && event.data.u64 == 1, "a connection is not noticed");
}
static void tcp_epoll_spoil(void) { tcp_spoil_client(); }
STATE(tcp_epoll)

static void tcp_epoll_edge_setup(void)
{
	tcp_connect_at("127.0.0.1");
	epoll_fd = MUST(epoll_create1(0));
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = 9};
	MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, client, &event));
	MUST(epoll_wait(epoll_fd, &event, 1, 0));
}
static void tcp_epoll_edge_check(void)
{
	struct epoll_event event;
	MUST(epoll_wait(epoll_fd, &event, 1, 0));
	CHECK(epoll_wait(epoll_fd, &event, 1, 0) == 0, "an edge comes twice");
	net_send(server, 71, 10);
	CHECK(epoll_wait(epoll_fd, &event, 1, 5000) == 1 && event.events & EPOLLIN, "data is not noticed");
	net_expect(client, 71, 10);
	tcp_expect_talk();
}
static void tcp_epoll_edge_spoil(void) { tcp_spoil_server(); }
STATE(tcp_epoll_edge)

static void tcp_owner_setup(void)
{
	listener = tcp_listen("127.0.0.1", 5);
	MUST(fchown(listener, 1000, 1001));
	MUST(fchmod(listener, 0640));
	MUST(fcntl(listener, F_SETFL, O_NONBLOCK));
}
static void tcp_owner_check(void)
{
	struct stat stat;
	MUST(fstat(listener, &stat));
	CHECK(stat.st_uid == 1000 && stat.st_gid == 1001 && (stat.st_mode & 07777) == 0640, "owner %u:%u, mode %o", stat.st_uid, stat.st_gid, stat.st_mode);
	CHECK(fcntl(listener, F_GETFL) & O_NONBLOCK, "it waits");
	CHECK(accept(listener, NULL, NULL) == -1 && errno == EAGAIN, "accept");
}
static void tcp_owner_spoil(void) { MUST(fchown(listener, 1000, 1002)); }
STATE(tcp_owner)

static void tcp_close_on_exec_setup(void)
{
	listener = tcp_listen("127.0.0.1", 5);
	other = MUST(dup(listener));
}
static void tcp_close_on_exec_check(void)
{
	CHECK(fcntl(listener, F_GETFD) == FD_CLOEXEC && fcntl(other, F_GETFD) == 0, "flags %d and %d", fcntl(listener, F_GETFD), fcntl(other, F_GETFD));
	tcp_expect_service("127.0.0.1", net_port(other));
}
static void tcp_close_on_exec_spoil(void) { MUST(fcntl(other, F_SETFD, FD_CLOEXEC)); }
STATE(tcp_close_on_exec)
