/* Sockets of the link layer. */
#include "net.h"

#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <sys/mman.h>

static int packets = -1, more = -1;

static int packet_socket(int type, int protocol) { return MUST(socket(AF_PACKET, type | SOCK_CLOEXEC, htons(protocol))); }

static void packet_bind(int socket, int protocol, const char *interface)
{
	struct sockaddr_ll name = {.sll_family = AF_PACKET, .sll_protocol = htons(protocol)};
	name.sll_ifindex = interface ? (int)if_nametoindex(interface) : 0;
	MUST(bind(socket, (struct sockaddr *)&name, sizeof name));
}

static struct sockaddr_ll packet_name(int socket)
{
	struct sockaddr_ll name = {0};
	socklen_t bytes = sizeof name;
	MUST(getsockname(socket, (struct sockaddr *)&name, &bytes));
	return name;
}

/* Sends a datagram of `text` over the loopback, to somebody, as ICMP would repeat it otherwise. */
static void packet_emit(const char *text)
{
	struct net_address to = net_address("127.0.0.1", 0);
	int receiver = MUST(socket(AF_INET, SOCK_DGRAM, 0)), sender = MUST(socket(AF_INET, SOCK_DGRAM, 0));
	MUST(bind(receiver, &to.any, to.bytes));
	to = net_address("127.0.0.1", net_port(receiver));
	MUST(sendto(sender, text, strlen(text), 0, &to.any, to.bytes));
	close(sender);
	close(receiver);
}

/* Receives until a packet ends with `text`. */
static bool packet_arrives(int socket, const char *text)
{
	char buffer[2048];
	size_t length = strlen(text);
	for (int i = 0; i < 50; i++) {
		ssize_t got = recv(socket, buffer, sizeof buffer, MSG_DONTWAIT);
		if (got >= (ssize_t)length && !memcmp(buffer + got - length, text, length))
			return true;
		if (got < 0) {
			struct timespec step = {.tv_nsec = 2000000};
			nanosleep(&step, NULL);
		}
	}
	return false;
}

static void packet_spoil(void) { close(packets); packets = packet_socket(SOCK_RAW, 0); }

static void packet_fresh_setup(void) { packets = packet_socket(SOCK_DGRAM, 0); net_set(packets, SOL_SOCKET, SO_RCVBUF, 30000); }
static void packet_fresh_check(void)
{
	CHECK(net_option(packets, SOL_SOCKET, SO_DOMAIN) == AF_PACKET && net_option(packets, SOL_SOCKET, SO_TYPE) == SOCK_DGRAM, "it is another");
	CHECK(net_option(packets, SOL_SOCKET, SO_RCVBUF) == 60000, "SO_RCVBUF");
	packet_emit("nobody");
	CHECK(!packet_arrives(packets, "nobody"), "it receives");
}
static void packet_fresh_spoil(void) { packet_bind(packets, ETH_P_IP, "lo"); }
STATE(packet_fresh)

static void packet_bound_setup(void)
{
	packets = packet_socket(SOCK_RAW, 0);
	net_set(packets, SOL_PACKET, PACKET_AUXDATA, 1);
	net_set(packets, SOL_PACKET, PACKET_VERSION, TPACKET_V2);
	packet_bind(packets, ETH_P_IP, "lo");
}
static void packet_bound_check(void)
{
	struct sockaddr_ll name = packet_name(packets);
	CHECK(ntohs(name.sll_protocol) == ETH_P_IP && name.sll_ifindex == (int)if_nametoindex("lo"), "protocol %#x, interface %d", ntohs(name.sll_protocol), name.sll_ifindex);
	CHECK(net_option(packets, SOL_PACKET, PACKET_AUXDATA) == 1 && net_option(packets, SOL_PACKET, PACKET_VERSION) == TPACKET_V2, "options");
	CHECK(net_option(packets, SOL_PACKET, PACKET_ORIGDEV) == 0, "PACKET_ORIGDEV");
	packet_emit("to be heard");
	CHECK(packet_arrives(packets, "to be heard"), "it hears nothing");
}
static void packet_bound_spoil(void) { packet_spoil(); }
STATE(packet_bound)

/* Made for all that comes, on every interface, through a filter of what is long. */
static void packet_filtered_setup(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_LEN, 0), BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, 200, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffff), BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog program = {.len = 4, .filter = code};
	packets = packet_socket(SOCK_DGRAM, 0);
	MUST(setsockopt(packets, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
	packet_bind(packets, ETH_P_ALL, NULL);
}
static void packet_filtered_check(void)
{
	char longer[256];
	memset(longer, 'x', sizeof longer);
	strcpy(longer + 240, "a long one");
	struct sockaddr_ll name = packet_name(packets);
	CHECK(ntohs(name.sll_protocol) == ETH_P_ALL && name.sll_ifindex == 0, "protocol %#x, interface %d", ntohs(name.sll_protocol), name.sll_ifindex);
	packet_emit("short");
	CHECK(!packet_arrives(packets, "short"), "the filter is gone");
	packet_emit(longer);
	CHECK(packet_arrives(packets, "a long one"), "it hears nothing");
}
static void packet_filtered_spoil(void) { MUST(setsockopt(packets, SOL_SOCKET, SO_DETACH_FILTER, NULL, 0)); }
STATE(packet_filtered)

static int packet_leave(int type)
{
	struct packet_mreq request = {.mr_ifindex = (int)if_nametoindex("lo"), .mr_type = (unsigned short)type};
	return setsockopt(packets, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &request, sizeof request);
}
static void packet_memberships_setup(void)
{
	struct packet_mreq request = {.mr_ifindex = (int)if_nametoindex("lo"), .mr_type = PACKET_MR_PROMISC};
	packets = packet_socket(SOCK_RAW, 0);
	for (int i = 0; i < 2; i++)
		MUST(setsockopt(packets, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request, sizeof request));
	request.mr_type = PACKET_MR_ALLMULTI;
	MUST(setsockopt(packets, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request, sizeof request));
}
static bool packet_asked(int flag) { return strtoul(content("/sys/class/net/lo/flags"), NULL, 16) & (unsigned)flag; }
static void packet_memberships_check(void)
{
	CHECK(packet_asked(IFF_PROMISC) && packet_asked(IFF_ALLMULTI), "the interface's flags");
	MUST(packet_leave(PACKET_MR_PROMISC));
	CHECK(packet_asked(IFF_PROMISC), "it had asked once only");
	MUST(packet_leave(PACKET_MR_PROMISC));
	CHECK(!packet_asked(IFF_PROMISC), "it had asked more than twice");
	CHECK(packet_asked(IFF_ALLMULTI), "the other one is gone");
}
static void packet_memberships_spoil(void) { MUST(packet_leave(PACKET_MR_PROMISC)); }
STATE(packet_memberships)

/* Two sockets take turns. */
static void packet_fanout_setup(void)
{
	int *both[] = {&packets, &more};
	for (int i = 0; i < 2; i++) {
		*both[i] = packet_socket(SOCK_DGRAM, 0);
		packet_bind(*both[i], ETH_P_IP, "lo");
		net_set(*both[i], SOL_PACKET, PACKET_FANOUT, 4711 | PACKET_FANOUT_LB << 16);
	}
}
static void packet_fanout_check(void)
{
	int heard[2] = {0, 0};
	CHECK(net_option(packets, SOL_PACKET, PACKET_FANOUT) == (4711 | PACKET_FANOUT_LB << 16), "%#x", net_option(packets, SOL_PACKET, PACKET_FANOUT));
	for (int i = 0; i < 8; i++) {
		packet_emit("by turns");
		heard[0] += packet_arrives(packets, "by turns");
		heard[1] += packet_arrives(more, "by turns");
	}
	CHECK(heard[0] == 4 && heard[1] == 4, "%d and %d of 8", heard[0], heard[1]);
}
static void packet_fanout_spoil(void) { packet_spoil(); }
STATE(packet_fanout)

static void packet_obsolete_setup(void)
{
	struct sockaddr name = {.sa_family = AF_PACKET, .sa_data = "lo"};
	packets = packet_socket(SOCK_PACKET, ETH_P_IP);
	MUST(bind(packets, &name, sizeof name));
}
static void packet_obsolete_check(void)
{
	struct sockaddr name = {0};
	socklen_t bytes = sizeof name;
	MUST(getsockname(packets, &name, &bytes));
	CHECK(net_option(packets, SOL_SOCKET, SO_TYPE) == SOCK_PACKET && !strcmp(name.sa_data, "lo"), "it is another");
	packet_emit("in the old way");
	CHECK(packet_arrives(packets, "in the old way"), "it hears nothing");
}
static void packet_obsolete_spoil(void) { packet_spoil(); }
STATE(packet_obsolete)

static void packet_unread_setup(void)
{
	packets = packet_socket(SOCK_RAW, 0);
	packet_bind(packets, ETH_P_IP, "lo");
	packet_emit("waits");
}
static void packet_unread_check(void) { CHECK(packet_arrives(packets, "waits"), "it is gone"); }
static void packet_unread_spoil(void) { packet_unread_check(); }
STATE(packet_unread, .refused = "unread packets or an error in a packet socket")

static void packet_ring_setup(void)
{
	struct tpacket_req ring = {.tp_block_size = 4096, .tp_block_nr = 4, .tp_frame_size = 2048, .tp_frame_nr = 8};
	packets = packet_socket(SOCK_RAW, 0);
	MUST(setsockopt(packets, SOL_PACKET, PACKET_RX_RING, &ring, sizeof ring));
}
static void packet_ring_check(void)
{
	void *ring = mmap(NULL, 16384, PROT_READ, MAP_SHARED, packets, 0);
	CHECK(ring != MAP_FAILED, "it has no ring");
	munmap(ring, 16384);
}
static void packet_ring_spoil(void) { packet_spoil(); }
STATE(packet_ring, .refused = "a packet socket with a ring")
