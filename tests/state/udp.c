/* UDP, ping and raw sockets. */
#include "net.h"

#include <linux/filter.h>
#include <netinet/ip_icmp.h>
#include <netinet/udp.h>
#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>

#ifndef SO_DETACH_REUSEPORT_BPF
#define SO_DETACH_REUSEPORT_BPF 68
#endif

static int receiver = -1, sender = -1, other = -1;
static char name[64], peer[64];
static pid_t child;

static int udp(const char *ip) { return MUST(socket(strchr(ip, ':') ? AF_INET6 : AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)); }

static int udp_bound(const char *ip, int port)
{
	int socket = udp(ip);
	struct net_address address = net_address(ip, port);
	MUST(bind(socket, &address.any, address.bytes));
	return socket;
}

static void udp_connect(int socket, const char *ip, int port)
{
	struct net_address address = net_address(ip, port);
	MUST(connect(socket, &address.any, address.bytes));
}

static void udp_send(int socket, const char *ip, int port, const void *data, size_t bytes)
{
	struct net_address address = net_address(ip, port);
	CHECK(MUST(sendto(socket, data, bytes, 0, &address.any, address.bytes)) == (ssize_t)bytes, "sent in part");
}

/* The next datagram is `text` and from `from`. */
static void udp_expect(int socket, const char *text, const char *from)
{
	char buffer[256] = "";
	struct net_address address = {.bytes = sizeof address};
	struct pollfd fd = {.fd = socket, .events = POLLIN};
	CHECK(poll(&fd, 1, 5000) == 1, "%s does not come", text);
	ssize_t got = recvfrom(socket, buffer, sizeof buffer, MSG_DONTWAIT, &address.any, &address.bytes);
	CHECK(got == (ssize_t)strlen(text) && !memcmp(buffer, text, strlen(text)), "got %zd bytes `%s`, not `%s`", got, buffer, text);
	CHECK(!from || !strcmp(net_text(&address), from), "%s is from %s, not %s", text, net_text(&address), from);
}

static void udp_expect_nothing(int socket)
{
	char byte;
	CHECK(recv(socket, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "there is something to read");
}

static void udp_spoil(void)
{
	char byte;
	CHECK(recv(receiver, &byte, 1, MSG_DONTWAIT) >= 0, "nothing to take");
}

static void udp_spoil_name(void)
{
	MUST(close(receiver));
	receiver = udp("127.0.0.1");
}

static void udp_fresh_setup(void)
{
	sender = udp("127.0.0.1");
	net_set(sender, SOL_SOCKET, SO_BROADCAST, 1);
	net_set(sender, IPPROTO_IP, IP_TTL, 12);
	net_set(sender, SOL_SOCKET, SO_RCVBUF, 50000);
}
static void udp_fresh_check(void)
{
	CHECK(net_option(sender, SOL_SOCKET, SO_BROADCAST) == 1 && net_option(sender, IPPROTO_IP, IP_TTL) == 12, "options");
	CHECK(net_option(sender, SOL_SOCKET, SO_RCVBUF) == 100000, "SO_RCVBUF");
	CHECK(!strcmp(net_name(sender), "0.0.0.0 0"), "it is bound to %s", net_name(sender));
	receiver = udp_bound("127.0.0.1", 0);
	udp_send(sender, "127.0.0.1", net_port(receiver), "x", 1);
	udp_expect(receiver, "x", NULL);
}
static void udp_fresh_spoil(void) { net_set(sender, IPPROTO_IP, IP_TTL, 13); }
STATE(udp_fresh)

#define UDP_BOUND(id, ip, at) \
	static void id##_setup(void) \
	{ \
		receiver = udp_bound(ip, 0); \
		snprintf(name, sizeof name, "%s", net_name(receiver)); \
	} \
	static void id##_check(void) \
	{ \
		CHECK(!strcmp(net_name(receiver), name), "it is %s, was %s", net_name(receiver), name); \
		CHECK(!net_option(receiver, SOL_SOCKET, SO_REUSEADDR), "SO_REUSEADDR"); \
		sender = udp(at); \
		udp_send(sender, at, net_port(receiver), "hello", 5); \
		udp_expect(receiver, "hello", NULL); \
		struct net_address address = net_address(ip, net_port(receiver)); \
		other = udp(ip); \
		CHECK(bind(other, &address.any, address.bytes) == -1 && errno == EADDRINUSE, "somebody else gets its address"); \
	} \
	static void id##_spoil(void) { udp_spoil_name(); } \
	STATE(id)
UDP_BOUND(udp_bound_one, "127.0.0.3", "127.0.0.3")
UDP_BOUND(udp_bound_any, "0.0.0.0", "127.0.0.1")
UDP_BOUND(udp_bound_v6, "::1", "::1")
UDP_BOUND(udp_bound_dual, "::", "127.0.0.1")

static void udp_connected_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7001);
	sender = udp_bound("127.0.0.1", 7002);
	udp_connect(receiver, "127.0.0.1", 7002);
	udp_connect(sender, "127.0.0.1", 7001);
	CHECK(send(sender, "queued", 6, 0) == 6, "send");
}
static void udp_connected_check(void)
{
	CHECK(!strcmp(net_peer(receiver), "127.0.0.1 7002") && !strcmp(net_name(receiver), "127.0.0.1 7001"), "it is %s, its peer %s", net_name(receiver), net_peer(receiver));
	udp_expect(receiver, "queued", "127.0.0.1 7002");
	other = udp("127.0.0.1");
	udp_send(other, "127.0.0.1", 7001, "stranger", 8);
	udp_expect_nothing(receiver);
	CHECK(send(receiver, "back", 4, 0) == 4, "send");
	udp_expect(sender, "back", "127.0.0.1 7001");
}
static void udp_connected_spoil(void) { udp_spoil(); }
STATE(udp_connected)

static void udp_connected_auto_setup(void)
{
	receiver = udp_bound("::1", 0);
	sender = udp("::1");
	udp_connect(sender, "::1", net_port(receiver));
	snprintf(name, sizeof name, "%s", net_name(sender));
	snprintf(peer, sizeof peer, "%s", net_peer(sender));
}
static void udp_connected_auto_check(void)
{
	CHECK(!strcmp(net_name(sender), name) && !strcmp(net_peer(sender), peer), "it is %s, its peer %s", net_name(sender), net_peer(sender));
	CHECK(send(sender, "hi", 2, 0) == 2, "send");
	udp_expect(receiver, "hi", name);
}
static void udp_connected_auto_spoil(void) { udp_connect(sender, "::1", 9); }
STATE(udp_connected_auto)

static void udp_queue_setup(void)
{
	receiver = udp_bound("0.0.0.0", 7003);
	sender = udp_bound("127.0.0.1", 7004);
	other = udp_bound("127.0.0.8", 7005);
	udp_send(sender, "127.0.0.1", 7003, "one", 3);
	udp_send(other, "127.0.0.8", 7003, "two", 3);
	udp_send(sender, "127.0.0.1", 7003, "", 0);
	udp_send(sender, "127.0.0.1", 7003, "three", 5);
}
static void udp_queue_check(void)
{
	udp_expect(receiver, "one", "127.0.0.1 7004");
	udp_expect(receiver, "two", "127.0.0.8 7005");
	udp_expect(receiver, "", "127.0.0.1 7004");
	udp_expect(receiver, "three", "127.0.0.1 7004");
	udp_expect_nothing(receiver);
}
static void udp_queue_spoil(void) { udp_spoil(); }
STATE(udp_queue)

/* An empty datagram that the program has looked at already. */
static void udp_peeked_setup(void)
{
	char byte;
	receiver = udp_bound("127.0.0.1", 4701);
	sender = udp_bound("127.0.0.1", 4702);
	udp_send(sender, "127.0.0.1", 4701, "", 0);
	udp_send(sender, "127.0.0.1", 4701, "", 0);
	udp_send(sender, "127.0.0.1", 4701, "last", 4);
	CHECK(recv(receiver, &byte, 1, MSG_PEEK) == 0, "the first one is not empty");
}
static void udp_peeked_check(void)
{
	udp_expect(receiver, "", "127.0.0.1 4702");
	udp_expect(receiver, "", "127.0.0.1 4702");
	udp_expect(receiver, "last", "127.0.0.1 4702");
	udp_expect_nothing(receiver);
}
static void udp_peeked_spoil(void) { udp_expect(receiver, "", NULL); }
STATE(udp_peeked)

static void udp_queue_v6_setup(void)
{
	receiver = udp_bound("::1", 7006);
	sender = udp_bound("::1", 7007);
	udp_send(sender, "::1", 7006, "one", 3);
	udp_send(sender, "::1", 7006, "three", 5);
}
static void udp_queue_v6_check(void)
{
	udp_expect(receiver, "one", "::1 7007");
	udp_expect(receiver, "three", "::1 7007");
	udp_expect_nothing(receiver);
	udp_send(sender, "::1", 7006, "more", 4);
	udp_expect(receiver, "more", "::1 7007");
}
static void udp_queue_v6_spoil(void) { udp_spoil(); }
STATE(udp_queue_v6)

static void udp_queue_dual_setup(void)
{
	receiver = udp_bound("::", 7008);
	sender = udp_bound("127.0.0.1", 7009);
	other = udp_bound("::1", 7010);
	udp_send(sender, "127.0.0.1", 7008, "four", 4);
	udp_send(other, "::1", 7008, "six", 3);
}
static void udp_queue_dual_check(void)
{
	udp_expect(receiver, "four", "::ffff:127.0.0.1 7009");
	udp_expect(receiver, "six", "::1 7010");
	udp_expect_nothing(receiver);
}
static void udp_queue_dual_spoil(void) { udp_spoil(); }
STATE(udp_queue_dual)

/* From a socket that is gone, and had another port than anybody has now. */
static void udp_queue_gone_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7011);
	sender = udp_bound("127.0.0.1", 7012);
	udp_send(sender, "127.0.0.1", 7011, "last words", 10);
	MUST(close(sender));
}
static void udp_queue_gone_check(void) { udp_expect(receiver, "last words", "127.0.0.1 7012"); }
static void udp_queue_gone_spoil(void) { udp_spoil(); }
STATE(udp_queue_gone)

#define UDP_MANY 100
static char large[60000];
static void udp_queue_large_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7013);
	net_set(receiver, SOL_SOCKET, SO_RCVBUF, 200000);
	sender = udp("127.0.0.1");
	net_set(sender, SOL_SOCKET, SO_SNDBUF, 200000);
	memset(large, 'L', sizeof large);
	udp_send(sender, "127.0.0.1", 7013, large, sizeof large);
	for (char i = 0; i < UDP_MANY; i++)
		udp_send(sender, "127.0.0.1", 7013, &i, 1);
}
static void udp_queue_large_check(void)
{
	char again[sizeof large];
	CHECK(recv(receiver, again, sizeof again, MSG_DONTWAIT) == (ssize_t)sizeof large && !memcmp(large, again, sizeof large), "the large one differs");
	for (char i = 0; i < UDP_MANY; i++)
		CHECK(recv(receiver, again, sizeof again, MSG_DONTWAIT) == 1 && again[0] == i, "number %d differs", i);
	udp_expect_nothing(receiver);
}
static void udp_queue_large_spoil(void) { udp_spoil(); }
STATE(udp_queue_large)

static void udp_packet_info_setup(void)
{
	receiver = udp_bound("0.0.0.0", 7014);
	net_set(receiver, IPPROTO_IP, IP_PKTINFO, 1);
	net_set(receiver, IPPROTO_IP, IP_RECVTTL, 1);
	net_set(receiver, IPPROTO_IP, IP_RECVTOS, 1);
	sender = udp("127.0.0.1");
	net_set(sender, IPPROTO_IP, IP_TTL, 9);
	net_set(sender, IPPROTO_IP, IP_TOS, 0x20);
	udp_send(sender, "127.0.0.44", 7014, "told", 4);
}
static void udp_packet_info_check(void)
{
	char buffer[16], control[256];
	struct iovec vector = {buffer, sizeof buffer};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	CHECK(recvmsg(receiver, &message, MSG_DONTWAIT) == 4, "it is not there");
	bool address = false, ttl = false, tos = false;
	for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
		struct in_pktinfo info;
		if (part->cmsg_type == IP_PKTINFO) {
			memcpy(&info, CMSG_DATA(part), sizeof info);
			address = info.ipi_addr.s_addr == inet_addr("127.0.0.44");
		} else if (part->cmsg_type == IP_TTL)
			ttl = *CMSG_DATA(part) == 9;
		else if (part->cmsg_type == IP_TOS)
			tos = *CMSG_DATA(part) == 0x20;
	}
	CHECK(address && ttl && tos, "address %d, ttl %d, tos %d", address, ttl, tos);
}
static void udp_packet_info_spoil(void) { udp_spoil(); }
STATE(udp_packet_info)

static void udp_reuseport_setup(void)
{
	for (int i = 0; i < 2; i++) {
		int socket = udp("127.0.0.1");
		net_set(socket, SOL_SOCKET, SO_REUSEPORT, 1);
		struct net_address address = net_address("127.0.0.1", 7015);
		MUST(bind(socket, &address.any, address.bytes));
		*(i ? &other : &receiver) = socket;
	}
	sender = udp_bound("127.0.0.1", 7016);
	udp_send(sender, "127.0.0.1", 7015, "one", 3);
	/* The kernel has chosen one of them. */
	if (!(net_events(receiver) & POLLIN)) {
		int swap = receiver;
		receiver = other;
		other = swap;
	}
	CHECK(net_events(receiver) & POLLIN, "nobody has it");
}
static void udp_reuseport_check(void)
{
	udp_expect_nothing(other);
	udp_expect(receiver, "one", "127.0.0.1 7016");
	CHECK(!strcmp(net_peer(receiver), "none"), "it is connected");
	udp_send(sender, "127.0.0.1", 7015, "two", 3);
	int third = udp_bound("127.0.0.1", 0);
	udp_send(third, "127.0.0.1", 7015, "from others", 11);
	int count = 0;
	char buffer[16];
	for (int i = 0; i < 2; i++) {
		while (recv(i ? other : receiver, buffer, sizeof buffer, MSG_DONTWAIT) > 0)
			count++;
	}
	CHECK(count == 2, "%d of 2 arrived", count);
}
static void udp_reuseport_spoil(void) { udp_spoil(); }
STATE(udp_reuseport)

static void udp_reuse_setup(void)
{
	for (int i = 0; i < 2; i++) {
		int socket = udp("127.0.0.1");
		net_set(socket, SOL_SOCKET, SO_REUSEADDR, 1);
		struct net_address address = net_address("0.0.0.0", 7017);
		MUST(bind(socket, &address.any, address.bytes));
		*(i ? &other : &receiver) = socket;
	}
}
static void udp_reuse_check(void)
{
	CHECK(net_port(receiver) == 7017 && net_port(other) == 7017, "ports %d and %d", net_port(receiver), net_port(other));
	CHECK(net_option(receiver, SOL_SOCKET, SO_REUSEADDR) && net_option(other, SOL_SOCKET, SO_REUSEADDR), "SO_REUSEADDR");
}
static void udp_reuse_spoil(void) { udp_spoil_name(); }
STATE(udp_reuse)

static void udp_options_setup(void)
{
	receiver = udp_bound("::", 0);
	net_set(receiver, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
	net_set(receiver, IPPROTO_IPV6, IPV6_RECVTCLASS, 1);
	net_set(receiver, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1);
	net_set(receiver, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 7);
	net_set(receiver, IPPROTO_IPV6, IPV6_MULTICAST_HOPS, 3);
	net_set(receiver, IPPROTO_IPV6, IPV6_MULTICAST_LOOP, 0);
	net_set(receiver, IPPROTO_IPV6, IPV6_TCLASS, 0x40);
	net_set(receiver, IPPROTO_IPV6, IPV6_RECVERR, 1);
	net_set(receiver, IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO);
	net_set(receiver, SOL_SOCKET, SO_TIMESTAMPNS, 1);
	net_set(receiver, SOL_SOCKET, SO_RXQ_OVFL, 1);
	sender = udp("127.0.0.1");
	net_set(sender, IPPROTO_IP, IP_FREEBIND, 1);
	net_set(sender, IPPROTO_IP, IP_RECVERR, 1);
	net_set(sender, IPPROTO_IP, IP_MULTICAST_TTL, 5);
	net_set(sender, IPPROTO_IP, IP_MULTICAST_LOOP, 0);
	net_set(sender, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE);
	net_set(sender, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
	net_set(sender, SOL_SOCKET, SO_NO_CHECK, 1);
	net_set(sender, SOL_SOCKET, SO_PRIORITY, 4);
	net_set(sender, IPPROTO_UDP, UDP_SEGMENT, 1200);
	net_set(sender, SOL_SOCKET, SO_DONTROUTE, 1);
}
static void udp_options_check(void)
{
	static const int v6[][3] = {
		{IPPROTO_IPV6, IPV6_RECVPKTINFO, 1}, {IPPROTO_IPV6, IPV6_RECVTCLASS, 1}, {IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1},
		{IPPROTO_IPV6, IPV6_UNICAST_HOPS, 7}, {IPPROTO_IPV6, IPV6_MULTICAST_HOPS, 3}, {IPPROTO_IPV6, IPV6_MULTICAST_LOOP, 0},
		{IPPROTO_IPV6, IPV6_TCLASS, 0x40}, {IPPROTO_IPV6, IPV6_RECVERR, 1}, {IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO},
		{SOL_SOCKET, SO_TIMESTAMPNS, 1}, {SOL_SOCKET, SO_TIMESTAMP, 0}, {SOL_SOCKET, SO_RXQ_OVFL, 1},
	};
	static const int v4[][3] = {
		{IPPROTO_IP, IP_FREEBIND, 1}, {IPPROTO_IP, IP_RECVERR, 1}, {IPPROTO_IP, IP_MULTICAST_TTL, 5}, {IPPROTO_IP, IP_MULTICAST_LOOP, 0},
		{IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE}, {IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1}, {SOL_SOCKET, SO_NO_CHECK, 1},
		{SOL_SOCKET, SO_PRIORITY, 4}, {IPPROTO_UDP, UDP_SEGMENT, 1200}, {SOL_SOCKET, SO_DONTROUTE, 1},
	};
	for (size_t i = 0; i < sizeof v6 / sizeof *v6; i++)
		CHECK(net_option(receiver, v6[i][0], v6[i][1]) == v6[i][2], "option %d of level %d is %d", v6[i][1], v6[i][0], net_option(receiver, v6[i][0], v6[i][1]));
	for (size_t i = 0; i < sizeof v4 / sizeof *v4; i++)
		CHECK(net_option(sender, v4[i][0], v4[i][1]) == v4[i][2], "option %d of level %d is %d", v4[i][1], v4[i][0], net_option(sender, v4[i][0], v4[i][1]));
}
static void udp_options_spoil(void) { net_set(sender, IPPROTO_UDP, UDP_SEGMENT, 1201); }
STATE(udp_options)

static void udp_device_setup(void)
{
	receiver = udp_bound("0.0.0.0", 7018);
	MUST(setsockopt(receiver, SOL_SOCKET, SO_BINDTODEVICE, "lo", 2));
	sender = udp_bound("127.0.0.1", 7019);
	udp_send(sender, "127.0.0.1", 7018, "dev", 3);
}
static void udp_device_check(void)
{
	char device[IFNAMSIZ] = "";
	socklen_t bytes = sizeof device;
	MUST(getsockopt(receiver, SOL_SOCKET, SO_BINDTODEVICE, device, &bytes));
	CHECK(!strcmp(device, "lo"), "it is bound to `%s`", device);
	udp_expect(receiver, "dev", "127.0.0.1 7019");
}
static void udp_device_spoil(void) { udp_spoil(); }
STATE(udp_device)

/* Only what begins with an `a` gets in. */
static void udp_filter_setup(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 8),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 'a', 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffff),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog program = {4, code};
	receiver = udp_bound("127.0.0.1", 7020);
	sender = udp_bound("127.0.0.1", 7021);
	udp_send(sender, "127.0.0.1", 7020, "before", 6);
	MUST(setsockopt(receiver, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
	net_set(receiver, SOL_SOCKET, SO_LOCK_FILTER, 1);
}
static void udp_filter_check(void)
{
	udp_expect(receiver, "before", "127.0.0.1 7021");
	udp_send(sender, "127.0.0.1", 7020, "bad", 3);
	udp_send(sender, "127.0.0.1", 7020, "allowed", 7);
	udp_expect(receiver, "allowed", "127.0.0.1 7021");
	udp_expect_nothing(receiver);
	int zero = 0;
	CHECK(setsockopt(receiver, SOL_SOCKET, SO_DETACH_FILTER, &zero, sizeof zero) == -1 && errno == EPERM, "the filter is not locked");
}
static void udp_filter_spoil(void) { udp_spoil(); }
STATE(udp_filter)

static void udp_multicast_setup(void)
{
	receiver = udp_bound("0.0.0.0", 7022);
	struct ip_mreqn request = {.imr_multiaddr.s_addr = inet_addr("239.1.2.3"), .imr_address.s_addr = inet_addr("127.0.0.1")};
	MUST(setsockopt(receiver, IPPROTO_IP, IP_ADD_MEMBERSHIP, &request, sizeof request));
	net_set(receiver, IPPROTO_IP, IP_MULTICAST_ALL, 0);
	sender = udp("127.0.0.1");
	MUST(setsockopt(sender, IPPROTO_IP, IP_MULTICAST_IF, &request.imr_address, sizeof request.imr_address));
}
static void udp_multicast_check(void)
{
	udp_send(sender, "239.1.2.3", 7022, "group", 5);
	udp_expect(receiver, "group", NULL);
	struct ip_mreqn request = {.imr_multiaddr.s_addr = inet_addr("239.1.2.3"), .imr_address.s_addr = inet_addr("127.0.0.1")};
	MUST(setsockopt(receiver, IPPROTO_IP, IP_DROP_MEMBERSHIP, &request, sizeof request));
	udp_send(sender, "239.1.2.3", 7022, "group", 5);
	udp_expect_nothing(receiver);
}
static void udp_multicast_spoil(void)
{
	struct ip_mreqn request = {.imr_multiaddr.s_addr = inet_addr("239.1.2.3"), .imr_address.s_addr = inet_addr("127.0.0.1")};
	MUST(setsockopt(receiver, IPPROTO_IP, IP_DROP_MEMBERSHIP, &request, sizeof request));
}
STATE(udp_multicast)

static void udp_multicast_source_setup(void)
{
	receiver = udp_bound("0.0.0.0", 7023);
	struct ip_mreq_source request = {
		.imr_multiaddr.s_addr = inet_addr("232.1.2.3"), .imr_interface.s_addr = inet_addr("127.0.0.1"), .imr_sourceaddr.s_addr = inet_addr("127.0.0.2"),
	};
	MUST(setsockopt(receiver, IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, &request, sizeof request));
}
static void udp_multicast_source_check(void)
{
	char buffer[IP_MSFILTER_SIZE(4)];
	struct ip_msfilter *filter = (void *)buffer;
	socklen_t bytes = sizeof buffer;
	memset(buffer, 0, sizeof buffer);
	filter->imsf_multiaddr.s_addr = inet_addr("232.1.2.3");
	filter->imsf_interface.s_addr = inet_addr("127.0.0.1");
	filter->imsf_numsrc = 4;
	MUST(getsockopt(receiver, IPPROTO_IP, IP_MSFILTER, filter, &bytes));
	CHECK(filter->imsf_fmode == MCAST_INCLUDE && filter->imsf_numsrc == 1, "mode %u, %u sources", filter->imsf_fmode, filter->imsf_numsrc);
	CHECK(filter->imsf_slist[0].s_addr == inet_addr("127.0.0.2"), "the source is another");
}
static void udp_multicast_source_spoil(void)
{
	struct ip_mreq_source request = {
		.imr_multiaddr.s_addr = inet_addr("232.1.2.3"), .imr_interface.s_addr = inet_addr("127.0.0.1"), .imr_sourceaddr.s_addr = inet_addr("127.0.0.3"),
	};
	MUST(setsockopt(receiver, IPPROTO_IP, IP_ADD_SOURCE_MEMBERSHIP, &request, sizeof request));
}
STATE(udp_multicast_source)

static void udp_multicast_v6_setup(void)
{
	receiver = udp_bound("::", 7024);
	struct ipv6_mreq request = {.ipv6mr_interface = if_nametoindex("lo")};
	inet_pton(AF_INET6, "ff01::77", &request.ipv6mr_multiaddr);
	MUST(setsockopt(receiver, IPPROTO_IPV6, IPV6_ADD_MEMBERSHIP, &request, sizeof request));
}
static void udp_multicast_v6_check(void)
{
	struct ipv6_mreq request = {.ipv6mr_interface = if_nametoindex("lo")};
	inet_pton(AF_INET6, "ff01::77", &request.ipv6mr_multiaddr);
	CHECK(setsockopt(receiver, IPPROTO_IPV6, IPV6_DROP_MEMBERSHIP, &request, sizeof request) == 0, "it is no member");
}
static void udp_multicast_v6_spoil(void)
{
	udp_multicast_v6_check();
}
STATE(udp_multicast_v6)

static void udp_shut_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7025);
	udp_connect(receiver, "127.0.0.1", 7026);
	MUST(shutdown(receiver, SHUT_RD));
}
static void udp_shut_check(void)
{
	char byte;
	CHECK(net_events(receiver) & POLLRDHUP, "events %#x", net_events(receiver));
	CHECK(recv(receiver, &byte, 1, 0) == 0, "it waits");
}
static void udp_shut_spoil(void) { udp_spoil_name(); }
STATE(udp_shut)

/* A socket that is not connected is shut all the same, though the call fails. */
static void udp_shut_alone(int how)
{
	receiver = udp_bound("127.0.0.1", 7027);
	CHECK(shutdown(receiver, how) == -1 && errno == ENOTCONN, "it is connected");
}
static void udp_shut_alone_setup(void) { udp_shut_alone(SHUT_RDWR); }
static void udp_shut_alone_check(void)
{
	char byte;
	CHECK(net_events(receiver) & POLLHUP, "events %#x", net_events(receiver));
	CHECK(recv(receiver, &byte, 1, 0) == 0, "it waits");
}
static void udp_shut_alone_spoil(void) { udp_spoil_name(); }
STATE(udp_shut_alone)

static void udp_shut_writing_setup(void) { udp_shut_alone(SHUT_WR); }
static void udp_shut_writing_check(void)
{
	struct net_address address = net_address("127.0.0.1", 7027);
	ssize_t sent = sendto(receiver, "word", 4, MSG_NOSIGNAL, &address.any, address.bytes);
	CHECK(sent == -1 && errno == EPIPE, "it may send");
	sender = udp("127.0.0.1");
	udp_send(sender, "127.0.0.1", 7027, "word", 4);
	udp_expect(receiver, "word", NULL);
}
static void udp_shut_writing_spoil(void)
{
	udp_spoil_name();
	struct net_address address = net_address("127.0.0.1", 7027);
	MUST(bind(receiver, &address.any, address.bytes));
}
STATE(udp_shut_writing)

static void udp_corked_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7027);
	sender = udp("127.0.0.1");
	udp_connect(sender, "127.0.0.1", 7027);
	net_set(sender, IPPROTO_UDP, UDP_CORK, 1);
	CHECK(send(sender, "half", 4, 0) == 4, "send");
}
static void udp_corked_check(void)
{
	udp_expect_nothing(receiver);
	net_set(sender, IPPROTO_UDP, UDP_CORK, 0);
	udp_expect(receiver, "half", NULL);
}
static void udp_corked_spoil(void) { net_set(sender, IPPROTO_UDP, UDP_CORK, 0); }
STATE(udp_corked, .refused = "corked")

static int udp_receive_body(void)
{
	char buffer[16];
	return recv(receiver, buffer, sizeof buffer, 0) == 4 ? 0 : 3;
}
static void udp_blocked_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7028);
	child = in_child(udp_receive_body);
	usleep(50000);
}
static void udp_blocked_check(void)
{
	sender = udp("127.0.0.1");
	udp_send(sender, "127.0.0.1", 7028, "wake", 4);
	expect_exit(child, 0);
}
static void udp_blocked_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(udp_blocked)

static int epoll_fd;
static void udp_epoll_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7029);
	sender = udp_bound("127.0.0.1", 7030);
	epoll_fd = MUST(epoll_create1(0));
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 5};
	MUST(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, receiver, &event));
	udp_send(sender, "127.0.0.1", 7029, "due", 3);
}
static void udp_epoll_check(void)
{
	struct epoll_event event;
	CHECK(epoll_wait(epoll_fd, &event, 1, 0) == 1 && event.data.u64 == 5, "what was due is not");
	udp_expect(receiver, "due", "127.0.0.1 7030");
	CHECK(epoll_wait(epoll_fd, &event, 1, 0) == 0, "something is due");
	udp_send(sender, "127.0.0.1", 7029, "new", 3);
	CHECK(epoll_wait(epoll_fd, &event, 1, 5000) == 1, "it is not noticed");
}
static void udp_epoll_spoil(void) { udp_spoil(); }
STATE(udp_epoll)

static int udp_shared_body(void)
{
	/* Once the first datagram is gone, which is for the other process. */
	char text[8];
	while (recv(receiver, text, sizeof text, MSG_PEEK) != 6)
		usleep(1000);
	udp_expect(receiver, "second", NULL);
	return 0;
}
static void udp_shared_setup(void)
{
	receiver = udp_bound("127.0.0.1", 7031);
	sender = udp("127.0.0.1");
	udp_send(sender, "127.0.0.1", 7031, "first", 5);
	child = in_child(udp_shared_body);
}
static void udp_shared_check(void)
{
	udp_expect(receiver, "first", NULL);
	udp_send(sender, "127.0.0.1", 7031, "second", 6);
	expect_exit(child, 0);
}
static void udp_shared_spoil(void) { udp_spoil(); }
STATE(udp_shared)

/* Raw and ping sockets. */

static void raw_icmp_setup(void)
{
	receiver = MUST(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
	struct icmp_filter { uint32_t data; } filter = {~(1u << ICMP_ECHOREPLY)};
	MUST(setsockopt(receiver, 255 /* SOL_RAW */, 1 /* ICMP_FILTER */, &filter, sizeof filter));
	struct net_address address = net_address("127.0.0.1", 0);
	MUST(bind(receiver, &address.any, address.bytes));
	MUST(connect(receiver, &address.any, address.bytes));
}
static void raw_icmp_check(void)
{
	CHECK(net_option(receiver, 255, 1) == (int)~(1u << ICMP_ECHOREPLY), "ICMP_FILTER");
	struct icmphdr echo = {.type = ICMP_ECHO, .un.echo.id = 7, .checksum = (uint16_t)~(8 + 7)};
	char answer[256];
	CHECK(send(receiver, &echo, sizeof echo, 0) == sizeof echo, "send");
	struct pollfd fd = {.fd = receiver, .events = POLLIN};
	CHECK(poll(&fd, 1, 5000) == 1, "nobody answers");
	ssize_t got = recv(receiver, answer, sizeof answer, 0);
	CHECK(got == 28 && answer[20] == ICMP_ECHOREPLY, "%zd bytes of type %d", got, answer[20]);
}
static void raw_icmp_spoil(void) { net_set(receiver, 255, 1, 0); }
STATE(raw_icmp)

static void raw_header_setup(void)
{
	sender = MUST(socket(AF_INET, SOCK_RAW, IPPROTO_RAW));
	receiver = MUST(socket(AF_INET, SOCK_RAW, 253));
	net_set(receiver, IPPROTO_IP, IP_HDRINCL, 1);
}
static void raw_header_check(void)
{
	CHECK(net_option(sender, IPPROTO_IP, IP_HDRINCL) == 1 && net_option(receiver, IPPROTO_IP, IP_HDRINCL) == 1, "IP_HDRINCL");
	CHECK(net_option(receiver, SOL_SOCKET, SO_PROTOCOL) == 253, "SO_PROTOCOL");
	CHECK(!strcmp(net_peer(receiver), "none"), "it is connected");
}
static void raw_header_spoil(void) { net_set(receiver, IPPROTO_IP, IP_HDRINCL, 0); }
STATE(raw_header)

static void raw_v6_setup(void)
{
	receiver = MUST(socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6));
	uint32_t filter[8] = {1, 2, 3, 4, 5, 6, 7, 8};
	MUST(setsockopt(receiver, IPPROTO_ICMPV6, 1 /* ICMPV6_FILTER */, filter, sizeof filter));
	net_set(receiver, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
}
static void raw_v6_check(void)
{
	uint32_t filter[8];
	socklen_t bytes = sizeof filter;
	MUST(getsockopt(receiver, IPPROTO_ICMPV6, 1, filter, &bytes));
	for (uint32_t i = 0; i < 8; i++)
		CHECK(filter[i] == i + 1, "word %u of ICMPV6_FILTER is %u", i, filter[i]);
	CHECK(net_option(receiver, IPPROTO_IPV6, IPV6_RECVPKTINFO) == 1, "IPV6_RECVPKTINFO");
}
static void raw_v6_spoil(void) { net_set(receiver, IPPROTO_IPV6, IPV6_RECVPKTINFO, 0); }
STATE(raw_v6)

static void raw_unread_setup(void)
{
	receiver = MUST(socket(AF_INET, SOCK_RAW, 253));
	sender = MUST(socket(AF_INET, SOCK_RAW, 253));
	udp_send(sender, "127.0.0.1", 0, "raw", 3);
	CHECK(net_events(receiver) & POLLIN, "it has not come");
}
static void raw_unread_check(void)
{
	char buffer[64];
	CHECK(recv(receiver, buffer, sizeof buffer, MSG_DONTWAIT) == 23, "it is gone");
}
static void raw_unread_spoil(void) { raw_unread_check(); }
STATE(raw_unread, .refused = "unread packets")

/* --- interfaces that the new container does not have --- */

/* Makes an interface with a link-local address of its own. */
static void udp_make_bridge(const char *name, const char *ip)
{
	int control = MUST(socket(AF_INET6, SOCK_DGRAM, 0));
	MUST(ioctl(control, SIOCBRADDBR, name));
	struct ifreq request = {.ifr_flags = IFF_UP | IFF_NOARP};
	strcpy(request.ifr_name, name);
	MUST(ioctl(control, SIOCSIFFLAGS, &request));
	/* `struct in6_ifreq` of linux/ipv6.h. */
	struct {
		struct in6_addr address;
		uint32_t prefix;
		int index;
	} addition = {.prefix = 64, .index = (int)if_nametoindex(name)};
	CHECK(inet_pton(AF_INET6, ip, &addition.address) == 1, "no address");
	MUST(ioctl(control, SIOCSIFADDR, &addition));
	close(control);
}

static void udp_link_local_setup(void)
{
	udp_make_bridge("samara0", "fe80:4567::1");
	receiver = MUST(socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0));
	struct net_address address = net_address("fe80:4567::1", 7777);
	address.v6.sin6_scope_id = if_nametoindex("samara0");
	/* The kernel looks at a new address by and by. */
	while (bind(receiver, &address.any, address.bytes)) {
		CHECK(errno == EADDRNOTAVAIL, "failed: bind: %m");
		usleep(1000);
	}
}
static void udp_link_local_check(void)
{
	char byte;
	CHECK(!strcmp(net_name(receiver), "fe80:4567::1 7777"), "it is %s", net_name(receiver));
	CHECK(recv(receiver, &byte, 1, 0) == -1 && errno == EAGAIN, "something arrives");
}
static void udp_link_local_spoil(void)
{
	MUST(dup2(MUST(socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK, 0)), receiver));
}
STATE(udp_link_local, .privileged = true)

static void udp_device_gone_setup(void)
{
	udp_make_bridge("samara1", "fe80:4568::1");
	receiver = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0));
	MUST(setsockopt(receiver, SOL_SOCKET, SO_BINDTODEVICE, "samara1", 8));
	struct net_address address = net_address("0.0.0.0", 7778);
	MUST(bind(receiver, &address.any, address.bytes));
}
static void udp_device_gone_check(void)
{
	CHECK(!strcmp(net_name(receiver), "0.0.0.0 7778"), "it is %s", net_name(receiver));
	int sender = MUST(socket(AF_INET, SOCK_DGRAM, 0));
	struct net_address address = net_address("127.0.0.1", 7778);
	MUST(sendto(sender, "x", 1, 0, &address.any, address.bytes));
	usleep(10000);
	char byte;
	CHECK(recv(receiver, &byte, 1, 0) == -1 && errno == EAGAIN, "something arrives from another interface");
}
static void udp_device_gone_spoil(void)
{
	MUST(setsockopt(receiver, SOL_SOCKET, SO_BINDTODEVICE, "", 0));
}
STATE(udp_device_gone, .privileged = true)
