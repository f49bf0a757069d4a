/* What the cases of unix sockets share. */
#ifndef STATE_UNIX_H
#define STATE_UNIX_H

#include "state.h"
#include <stddef.h>
#include <poll.h>
#include <pthread.h>
#include <grp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <linux/sockios.h>

#ifndef SO_PEERGROUPS
#define SO_PEERGROUPS 59
#endif
#ifndef SCM_PIDFD
#define SCM_PIDFD 4
#endif
#ifndef SO_PASSPIDFD
#define SO_PASSPIDFD 76
#endif

/* A path, or with a leading '@' an abstract name. */
static inline socklen_t address(struct sockaddr_un *at, const char *name)
{
	memset(at, 0, sizeof *at);
	at->sun_family = AF_UNIX;
	size_t length = strlen(name);
	CHECK(length < sizeof at->sun_path, "the name is too long");
	memcpy(at->sun_path, name, length);
	if (name[0] == '@') {
		at->sun_path[0] = 0;
		return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
	}
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
}

static inline int bound(int type, const char *name)
{
	struct sockaddr_un at;
	int fd = MUST(socket(AF_UNIX, type, 0));
	socklen_t length = address(&at, name);
	MUST(bind(fd, (struct sockaddr *)&at, length));
	return fd;
}

static inline int listening(int type, const char *name, int backlog)
{
	int fd = bound(type, name);
	MUST(listen(fd, backlog));
	return fd;
}

static inline int connect_to(int fd, const char *name)
{
	struct sockaddr_un at;
	socklen_t length = address(&at, name);
	return connect(fd, (struct sockaddr *)&at, length);
}

static inline int connected(int type, const char *name)
{
	int fd = MUST(socket(AF_UNIX, type, 0));
	MUST(connect_to(fd, name));
	return fd;
}

static inline void expect_name(int fd, bool peer, const char *name)
{
	struct sockaddr_un want, at;
	socklen_t length = sizeof at;
	memset(&at, 0, sizeof at);
	CHECK((peer ? getpeername : getsockname)(fd, (struct sockaddr *)&at, &length) == 0, "no %sname", peer ? "peer " : "");
	socklen_t expected = name ? address(&want, name) : sizeof(sa_family_t);
	CHECK(length == expected && (!name || !memcmp(at.sun_path, want.sun_path, length - sizeof(sa_family_t))),
		"the %sname is another: %u bytes, not %u: %s", peer ? "peer's " : "", length, expected, at.sun_path);
}

static inline void put(int fd, const char *text)
{
	MUST(send(fd, text, strlen(text), MSG_NOSIGNAL));
}

static inline void put_to(int fd, const char *text, const char *name)
{
	struct sockaddr_un at;
	socklen_t length = address(&at, name);
	MUST(sendto(fd, text, strlen(text), 0, (struct sockaddr *)&at, length));
}

/* What one read returns. */
static inline void expect_text(int fd, const char *text)
{
	char buffer[256];
	ssize_t count = recv(fd, buffer, sizeof buffer - 1, MSG_DONTWAIT);
	CHECK(count == (ssize_t)strlen(text), "%zd bytes are received, not `%s`", count, text);
	CHECK(!memcmp(buffer, text, strlen(text)), "`%.*s` is received, not `%s`", (int)count, buffer, text);
}

/* A datagram and the name of its sender. */
static inline void expect_from(int fd, const char *text, const char *name)
{
	char buffer[256];
	struct sockaddr_un at, want;
	socklen_t length = sizeof at;
	memset(&at, 0, sizeof at);
	ssize_t count = recvfrom(fd, buffer, sizeof buffer, MSG_DONTWAIT, (struct sockaddr *)&at, &length);
	CHECK(count == (ssize_t)strlen(text) && !memcmp(buffer, text, strlen(text)), "not `%s` is received, but %zd bytes", text, count);
	socklen_t expected = name ? address(&want, name) : 0;
	CHECK(length == expected && (!name || !memcmp(at.sun_path, want.sun_path, length - sizeof(sa_family_t))),
		"the sender of `%s` is another: %u bytes, not %u: %s", text, length, expected, at.sun_path);
}

static inline void expect_nothing(int fd)
{
	char byte;
	CHECK(recv(fd, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "something more is received");
}

static inline void expect_end(int fd)
{
	char byte;
	CHECK(recv(fd, &byte, 1, MSG_DONTWAIT) == 0, "the end is not received");
}

static inline void expect_link(int a, int b)
{
	put(a, "over");
	expect_text(b, "over");
	put(b, "back");
	expect_text(a, "back");
}

static inline void drain(int fd)
{
	char buffer[256];
	while (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) > 0)
		;
}

/* Sends text and descriptors, and credentials if there are any. */
static inline void put_message(int fd, const char *text, const int *files, size_t count, const struct ucred *credentials)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(16 * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
	memset(control, 0, sizeof control);
	struct iovec part = {.iov_base = (void *)(uintptr_t)text, .iov_len = strlen(text)};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control};
	struct cmsghdr *header = (struct cmsghdr *)control;
	if (count) {
		*header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(count * sizeof(int))};
		memcpy(CMSG_DATA(header), files, count * sizeof(int));
		message.msg_controllen += CMSG_SPACE(count * sizeof(int));
	}
	if (credentials) {
		header = (struct cmsghdr *)(control + message.msg_controllen);
		*header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_CREDENTIALS, .cmsg_len = CMSG_LEN(sizeof *credentials)};
		memcpy(CMSG_DATA(header), credentials, sizeof *credentials);
		message.msg_controllen += CMSG_SPACE(sizeof *credentials);
	}
	MUST(sendmsg(fd, &message, MSG_NOSIGNAL));
}

/* Receives a message; returns how many descriptors came, and the credentials. */
static inline size_t get_message(int fd, const char *text, int *files, struct ucred *credentials, int *process)
{
	char buffer[256];
	_Alignas(struct cmsghdr) char control[512];
	struct iovec part = {.iov_base = buffer, .iov_len = sizeof buffer};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
	CHECK(got == (ssize_t)strlen(text) && !memcmp(buffer, text, strlen(text)), "a message of %zd bytes, not `%s`", got, text);
	size_t count = 0;
	for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
		if (header->cmsg_type == SCM_RIGHTS) {
			count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			memcpy(files, CMSG_DATA(header), count * sizeof(int));
		} else if (header->cmsg_type == SCM_CREDENTIALS && credentials) {
			memcpy(credentials, CMSG_DATA(header), sizeof *credentials);
		} else if (header->cmsg_type == SCM_PIDFD && process) {
			memcpy(process, CMSG_DATA(header), sizeof *process);
		}
	}
	return count;
}

static inline struct ucred peer_of(int fd)
{
	struct ucred peer;
	socklen_t length = sizeof peer;
	MUST(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length));
	return peer;
}

static inline void expect_peer(int fd, pid_t pid, uid_t uid, gid_t gid)
{
	struct ucred peer = peer_of(fd);
	CHECK(peer.pid == pid && peer.uid == uid && peer.gid == gid, "the peer is process %d of %u:%u, not %d of %u:%u",
		peer.pid, peer.uid, peer.gid, pid, uid, gid);
}

static inline int option(int fd, int name)
{
	int value = 0;
	socklen_t length = sizeof value;
	MUST(getsockopt(fd, SOL_SOCKET, name, &value, &length));
	return value;
}

static inline void set_option(int fd, int name, int value) { MUST(setsockopt(fd, SOL_SOCKET, name, &value, sizeof value)); }

#endif
