/* Netlink sockets, and families that are not kept. */
#include "net.h"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>

static int route = -1, other = -1;
static struct sockaddr_nl before;

static struct sockaddr_nl netlink_name(int socket)
{
	struct sockaddr_nl name = {0};
	socklen_t bytes = sizeof name;
	MUST(getsockname(socket, (struct sockaddr *)&name, &bytes));
	return name;
}

static int netlink(int protocol) { return MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)); }

static void netlink_bind(int socket, uint32_t port, uint32_t groups)
{
	struct sockaddr_nl name = {.nl_family = AF_NETLINK, .nl_pid = port, .nl_groups = groups};
	MUST(bind(socket, (struct sockaddr *)&name, sizeof name));
}

/* Asks for the loopback by its number; the answer has to come to this socket. */
static void netlink_expect_answer(int socket)
{
	struct { struct nlmsghdr header; struct ifinfomsg info; } request = {
		.header = {.nlmsg_len = sizeof request, .nlmsg_type = RTM_GETLINK, .nlmsg_flags = NLM_F_REQUEST, .nlmsg_seq = 4711},
		.info = {.ifi_index = 1},
	};
	char answer[16384];
	CHECK(send(socket, &request, sizeof request, 0) == sizeof request, "send");
	ssize_t got = recv(socket, answer, sizeof answer, MSG_DONTWAIT);
	struct nlmsghdr *header = (void *)answer;
	CHECK(got > (ssize_t)sizeof *header && header->nlmsg_type == RTM_NEWLINK && header->nlmsg_seq == 4711, "%zd bytes of type %d", got, header->nlmsg_type);
}

static void netlink_spoil(void)
{
	close(route);
	route = netlink(NETLINK_ROUTE);
}

static void netlink_fresh_setup(void) { route = netlink(NETLINK_ROUTE); net_set(route, SOL_SOCKET, SO_RCVBUF, 30000); }
static void netlink_fresh_check(void)
{
	CHECK(netlink_name(route).nl_pid == 0, "it is bound to %u", netlink_name(route).nl_pid);
	CHECK(net_option(route, SOL_SOCKET, SO_RCVBUF) == 60000, "SO_RCVBUF");
	netlink_expect_answer(route);
}
static void netlink_fresh_spoil(void) { netlink_spoil(); }
STATE(netlink_fresh)

static void netlink_bound_setup(void) { route = netlink(NETLINK_ROUTE); netlink_bind(route, 123456, 0); }
static void netlink_bound_check(void)
{
	CHECK(netlink_name(route).nl_pid == 123456, "it is bound to %u", netlink_name(route).nl_pid);
	netlink_expect_answer(route);
}
static void netlink_bound_spoil(void) { netlink_spoil(); }
STATE(netlink_bound)

static void netlink_auto_setup(void)
{
	route = netlink(NETLINK_ROUTE);
	netlink_bind(route, 0, 0);
	other = netlink(NETLINK_ROUTE);
	netlink_bind(other, 0, 0);
	before = netlink_name(other);
}
static void netlink_auto_check(void)
{
	CHECK(netlink_name(route).nl_pid == (uint32_t)getpid(), "the first is %u", netlink_name(route).nl_pid);
	CHECK(netlink_name(other).nl_pid == before.nl_pid, "the second is %u, was %u", netlink_name(other).nl_pid, before.nl_pid);
	netlink_expect_answer(route);
	netlink_expect_answer(other);
}
static void netlink_auto_spoil(void) { netlink_spoil(); }
STATE(netlink_auto)

static void netlink_groups_setup(void)
{
	route = netlink(NETLINK_ROUTE);
	netlink_bind(route, 0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR);
	net_set(route, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_MDB > 26 ? RTNLGRP_IPV6_RULE : RTNLGRP_NSID);
	net_set(route, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 33);
}
static void netlink_groups_check(void)
{
	CHECK(netlink_name(route).nl_groups == (RTMGRP_LINK | RTMGRP_IPV4_IFADDR | 1u << (RTNLGRP_NSID - 1)), "groups %#x", netlink_name(route).nl_groups);
	uint32_t groups[8] = {0};
	socklen_t bytes = sizeof groups;
	MUST(getsockopt(route, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, groups, &bytes));
	CHECK(groups[1] == 1, "groups beyond the first 32: %#x", groups[1]);
}
static void netlink_groups_spoil(void) { net_set(route, SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, 33); }
STATE(netlink_groups)

static void netlink_options_setup(void)
{
	route = netlink(NETLINK_ROUTE);
	net_set(route, SOL_NETLINK, NETLINK_PKTINFO, 1);
	net_set(route, SOL_NETLINK, NETLINK_NO_ENOBUFS, 1);
	net_set(route, SOL_NETLINK, NETLINK_BROADCAST_ERROR, 1);
	net_set(route, SOL_NETLINK, NETLINK_CAP_ACK, 1);
	net_set(route, SOL_NETLINK, NETLINK_EXT_ACK, 1);
	net_set(route, SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1);
	MUST(fcntl(route, F_SETFL, O_NONBLOCK));
}
static void netlink_options_check(void)
{
	static const int names[] = {NETLINK_PKTINFO, NETLINK_NO_ENOBUFS, NETLINK_BROADCAST_ERROR, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK};
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		CHECK(net_option(route, SOL_NETLINK, names[i]) == 1, "option %d", names[i]);
	CHECK(fcntl(route, F_GETFL) & O_NONBLOCK, "it waits");
}
static void netlink_options_spoil(void) { net_set(route, SOL_NETLINK, NETLINK_EXT_ACK, 0); }
STATE(netlink_options)

static void netlink_connected_setup(void)
{
	route = netlink(NETLINK_USERSOCK);
	netlink_bind(route, 1001, 0);
	other = netlink(NETLINK_USERSOCK);
	netlink_bind(other, 1002, 0);
	struct sockaddr_nl to = {.nl_family = AF_NETLINK, .nl_pid = 1002};
	MUST(connect(route, (struct sockaddr *)&to, sizeof to));
}
static void netlink_connected_check(void)
{
	struct { struct nlmsghdr header; char text[4]; } message = {.header = {.nlmsg_len = sizeof message, .nlmsg_type = 77}, .text = "hi"};
	CHECK(send(route, &message, sizeof message, 0) == sizeof message, "send");
	memset(&message, 0, sizeof message);
	CHECK(recv(other, &message, sizeof message, MSG_DONTWAIT) == sizeof message && !strcmp(message.text, "hi"), "it has not come");
}
static void netlink_connected_spoil(void)
{
	struct sockaddr_nl to = {.nl_family = AF_NETLINK, .nl_pid = 1001};
	MUST(connect(route, (struct sockaddr *)&to, sizeof to));
}
STATE(netlink_connected)

static void netlink_others_setup(void)
{
	route = netlink(NETLINK_KOBJECT_UEVENT);
	netlink_bind(route, 0, 1);
	other = netlink(NETLINK_GENERIC);
	netlink_bind(other, 0, 0);
	before = netlink_name(other);
}
static void netlink_others_check(void)
{
	CHECK(netlink_name(route).nl_groups == 1 && netlink_name(other).nl_pid == before.nl_pid, "names");
	CHECK(net_option(route, SOL_SOCKET, SO_PROTOCOL) == NETLINK_KOBJECT_UEVENT && net_option(other, SOL_SOCKET, SO_PROTOCOL) == NETLINK_GENERIC, "protocols");
}
static void netlink_others_spoil(void) { netlink_spoil(); }
STATE(netlink_others)

static void netlink_unread_setup(void)
{
	route = netlink(NETLINK_USERSOCK);
	netlink_bind(route, 2001, 0);
	struct { struct nlmsghdr header; char text[4]; } message = {.header = {.nlmsg_len = sizeof message, .nlmsg_type = 77}, .text = "hi"};
	struct sockaddr_nl to = {.nl_family = AF_NETLINK, .nl_pid = 2001};
	other = netlink(NETLINK_USERSOCK);
	MUST(sendto(other, &message, sizeof message, 0, (struct sockaddr *)&to, sizeof to));
}
static void netlink_unread_check(void)
{
	char buffer[64];
	CHECK(recv(route, buffer, sizeof buffer, MSG_DONTWAIT) == 20, "it is gone");
}
static void netlink_unread_spoil(void) { netlink_unread_check(); }
STATE(netlink_unread, .refused = "unread messages in a netlink socket")

static void vm_socket_setup(void) { route = MUST(socket(AF_VSOCK, SOCK_STREAM, 0)); }
static void vm_socket_check(void) { CHECK(net_option(route, SOL_SOCKET, SO_DOMAIN) == AF_VSOCK, "it is another"); }
static void vm_socket_spoil(void) { netlink_spoil(); }
STATE(vm_socket, .refused = "AF_VSOCK")
