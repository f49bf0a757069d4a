/* Unix sockets: what travels beside the bytes, who is told, options, and who waits. */
#include "unix.h"

static int s[8], f[8];
static pid_t child;
static int sync_pipe[2];

static void pair(int type) { MUST(socketpair(AF_UNIX, type, 0, s)); }

/* Descriptors in flight. */

static void expect_content(int fd, const char *text)
{
	char buffer[256];
	ssize_t count = pread(fd, buffer, sizeof buffer, 0);
	CHECK(count == (ssize_t)strlen(text) && !memcmp(buffer, text, strlen(text)), "the file holds something else");
}

static int file_with(const char *path, const char *text)
{
	int fd = MUST(open(path, O_RDWR | O_CREAT | O_TRUNC, 0600));
	MUST(write(fd, text, strlen(text)));
	return fd;
}

static void rights_setup(int type)
{
	pair(type);
	int fd = file_with("/tmp/flight", "content"), pipe_ends[2];
	MUST(lseek(fd, 3, SEEK_SET));
	MUST(pipe(pipe_ends));
	MUST(write(pipe_ends[1], "piped", 5));
	int files[3] = {fd, pipe_ends[0], pipe_ends[1]};
	put_message(s[0], "plain", NULL, 0, NULL);
	put_message(s[0], "three", files, 3, NULL);
	put_message(s[0], "after", NULL, 0, NULL);
	for (int i = 0; i < 3; i++)
		close(files[i]);
}

static void rights_check(void)
{
	char buffer[8];
	if (option(s[1], SO_TYPE) == SOCK_STREAM) {
		/* The kernel gives the bytes before and those with descriptors at once. */
		CHECK(get_message(s[1], "plainthree", f, NULL, NULL) == 3, "there are not three descriptors");
	} else {
		CHECK(get_message(s[1], "plain", f, NULL, NULL) == 0, "there are descriptors");
		CHECK(get_message(s[1], "three", f, NULL, NULL) == 3, "there are not three descriptors");
	}
	CHECK(get_message(s[1], "after", NULL, NULL, NULL) == 0, "there are descriptors");
	CHECK(lseek(f[0], 0, SEEK_CUR) == 3, "the position is another");
	expect_content(f[0], "content");
	MUST(write(f[2], "more", 4));
	CHECK(read(f[1], buffer, 8) == 8 && !memcmp(buffer, "pipedmor", 8), "the pipe is another");
	expect_nothing(s[1]);
}

static void spoil_drain_1(void) { drain(s[1]); }

#define RIGHTS(id, type) \
	static void id##_setup(void) { rights_setup(type); } \
	static void id##_check(void) { rights_check(); } \
	static void id##_spoil(void) { spoil_drain_1(); } \
	STATE(id)

RIGHTS(unix_rights_stream, SOCK_STREAM)
RIGHTS(unix_rights_datagram, SOCK_DGRAM)
RIGHTS(unix_rights_seqpacket, SOCK_SEQPACKET)

static void unix_rights_short_reads_setup(void) { rights_setup(SOCK_STREAM); }
static void unix_rights_short_reads_check(void)
{
	char byte;
	for (const char *text = "plainthreeafter"; *text; text++)
		CHECK(recv(s[1], &byte, 1, MSG_DONTWAIT) == 1 && byte == *text, "instead of %c comes something else", *text);
	expect_nothing(s[1]);
}
static void unix_rights_short_reads_spoil(void) { MUST(read(s[1], f, 1)); }
STATE(unix_rights_short_reads)

static void unix_rights_boundary_setup(void) { rights_setup(SOCK_STREAM); }
static void unix_rights_boundary_check(void)
{
	char buffer[5];
	_Alignas(struct cmsghdr) char control[256];
	struct iovec part = {.iov_base = buffer, .iov_len = 5};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	CHECK(recvmsg(s[1], &message, MSG_DONTWAIT) == 5 && message.msg_controllen == 0, "descriptors come too early");
	CHECK(get_message(s[1], "three", f, NULL, NULL) == 3, "there are not three descriptors");
}
static void unix_rights_boundary_spoil(void) { MUST(read(s[1], f, 1)); }
STATE(unix_rights_boundary)

static void unix_rights_shared_setup(void)
{
	pair(SOCK_STREAM);
	f[7] = file_with("/tmp/shared", "0123456789");
	put_message(s[0], "a", &f[7], 1, NULL);
	put_message(s[0], "b", &f[7], 1, NULL);
}

static void unix_rights_shared_check(void)
{
	char byte;
	CHECK(get_message(s[1], "a", f, NULL, NULL) == 1 && get_message(s[1], "b", f + 1, NULL, NULL) == 1, "a descriptor is missing");
	MUST(lseek(f[7], 4, SEEK_SET));
	CHECK(read(f[0], &byte, 1) == 1 && byte == '4' && read(f[1], &byte, 1) == 1 && byte == '5', "they do not share a position");
}

static void unix_rights_shared_spoil(void) { close(f[7]); f[7] = MUST(open("/tmp/shared", O_RDONLY)); }
STATE(unix_rights_shared)

static void unix_rights_kinds_setup(void)
{
	pair(SOCK_SEQPACKET);
	int files[6];
	files[0] = MUST(eventfd(7, 0));
	files[1] = MUST(memfd_create("flight", 0));
	MUST(write(files[1], "memory", 6));
	files[2] = MUST(open("/tmp/unlinked", O_RDWR | O_CREAT, 0600));
	MUST(write(files[2], "unlinked", 8));
	MUST(unlink("/tmp/unlinked"));
	files[3] = MUST(epoll_create1(0));
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 99};
	MUST(epoll_ctl(files[3], EPOLL_CTL_ADD, files[0], &event));
	files[4] = MUST(open("/tmp", O_RDONLY | O_DIRECTORY));
	files[5] = MUST(open("/dev/zero", O_WRONLY));
	put_message(s[0], "kinds", files, 6, NULL);
	for (int i = 0; i < 6; i++)
		close(files[i]);
}

static void unix_rights_kinds_check(void)
{
	uint64_t count;
	struct epoll_event event;
	CHECK(get_message(s[1], "kinds", f, NULL, NULL) == 6, "there are not six descriptors");
	CHECK(epoll_wait(f[3], &event, 1, 0) == 1 && event.data.u64 == 99, "the epoll watches something else");
	CHECK(read(f[0], &count, 8) == 8 && count == 7, "the count is another");
	CHECK(epoll_wait(f[3], &event, 1, 0) == 0, "the epoll watches another file");
	expect_content(f[1], "memory");
	expect_content(f[2], "unlinked");
	CHECK(fchdir(f[4]) == 0, "it is no directory");
	CHECK(write(f[5], "x", 1) == 1, "it can't be written to");
}

static void unix_rights_kinds_spoil(void) { drain(s[1]); }
STATE(unix_rights_kinds)

static void unix_rights_own_peer_setup(void)
{
	pair(SOCK_STREAM);
	put_message(s[0], "peer", &s[0], 1, NULL);
	put_message(s[0], "self", &s[1], 1, NULL);
	close(s[0]);
}

static void unix_rights_own_peer_check(void)
{
	CHECK(get_message(s[1], "peer", f, NULL, NULL) == 1, "no descriptor");
	CHECK(get_message(s[1], "self", f + 1, NULL, NULL) == 1, "no descriptor");
	expect_link(f[0], s[1]);
	expect_link(f[0], f[1]);
	close(f[0]);
	expect_end(s[1]);
}

static void unix_rights_own_peer_spoil(void) { drain(s[1]); }
STATE(unix_rights_own_peer)

static void unix_rights_nested_setup(void)
{
	int inner[2], innermost[2];
	pair(SOCK_DGRAM);
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, inner));
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, innermost));
	put_message(innermost[0], "deep", NULL, 0, NULL);
	put_message(inner[0], "inner", innermost, 2, NULL);
	put_message(s[0], "outer", inner, 2, NULL);
	close(inner[0]);
	close(inner[1]);
	close(innermost[0]);
	close(innermost[1]);
}

static void unix_rights_nested_check(void)
{
	CHECK(get_message(s[1], "outer", f, NULL, NULL) == 2, "no descriptors");
	CHECK(get_message(f[1], "inner", f + 2, NULL, NULL) == 2, "no descriptors inside");
	expect_text(f[3], "deep");
	expect_link(f[2], f[3]);
	expect_link(f[0], f[1]);
}

static void unix_rights_nested_spoil(void) { drain(s[1]); }
STATE(unix_rights_nested)

static void unix_rights_listener_setup(void)
{
	pair(SOCK_STREAM);
	int listener = listening(SOCK_STREAM, "/tmp/flying", 5);
	f[7] = connected(SOCK_STREAM, "/tmp/flying");
	put_message(s[0], "listener", &listener, 1, NULL);
	close(listener);
}

static void unix_rights_listener_check(void)
{
	CHECK(get_message(s[1], "listener", f, NULL, NULL) == 1, "no descriptor");
	expect_link(f[7], MUST(accept(f[0], NULL, NULL)));
	int client = connected(SOCK_STREAM, "/tmp/flying");
	expect_link(client, MUST(accept(f[0], NULL, NULL)));
}

static void unix_rights_listener_spoil(void) { drain(s[1]); }
STATE(unix_rights_listener)

static void unix_rights_many_setup(void)
{
	int files[16];
	pair(SOCK_STREAM);
	for (int i = 0; i < 16; i++)
		files[i] = MUST(eventfd((unsigned)i + 1, 0));
	for (int round = 0; round < 8; round++)
		put_message(s[0], "x", files, 16, NULL);
	for (int i = 0; i < 16; i++)
		close(files[i]);
}

static void unix_rights_many_check(void)
{
	int files[16];
	uint64_t count;
	for (int round = 0; round < 8; round++) {
		CHECK(get_message(s[1], "x", files, NULL, NULL) == 16, "round %d has fewer", round);
		if (round == 7)
			CHECK(read(files[15], &count, 8) == 8 && count == 16, "the last counts another number");
		for (int i = 0; i < 16; i++)
			close(files[i]);
	}
}

static void unix_rights_many_spoil(void) { drain(s[1]); }
STATE(unix_rights_many)

static void unix_rights_datagram_named_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "/tmp/receiver");
	s[1] = connected(SOCK_DGRAM, "/tmp/receiver");
	int fd = MUST(eventfd(3, EFD_NONBLOCK));
	put_message(s[1], "event", &fd, 1, NULL);
	close(fd);
}

static void unix_rights_datagram_named_check(void)
{
	uint64_t count;
	CHECK(get_message(s[0], "event", f, NULL, NULL) == 1, "no descriptor");
	CHECK(read(f[0], &count, 8) == 8 && count == 3, "it counts another number");
}

static void unix_rights_datagram_named_spoil(void) { drain(s[0]); }
STATE(unix_rights_datagram_named)

/* Credentials. */

static void expect_credentials(int fd, const char *text, pid_t pid, uid_t uid, gid_t gid)
{
	struct ucred got = {.pid = -1};
	get_message(fd, text, f, &got, NULL);
	CHECK(got.pid == pid && got.uid == uid && got.gid == gid, "`%s` is from process %d of %u:%u, not %d of %u:%u",
		text, got.pid, got.uid, got.gid, pid, uid, gid);
}

static int credentials_body(void)
{
	MUST(setgid(1000));
	MUST(setuid(1000));
	put(s[0], "child");
	MUST(write(sync_pipe[1], "x", 1));
	until_finishing();
	return 0;
}

static void credentials_setup(int type)
{
	char byte;
	struct ucred claimed = {.pid = getpid(), .uid = 33, .gid = 44};
	pair(type);
	set_option(s[1], SO_PASSCRED, 1);
	put(s[0], "parent");
	MUST(pipe(sync_pipe));
	child = in_child(credentials_body);
	MUST(read(sync_pipe[0], &byte, 1));
	put_message(s[0], "claimed", NULL, 0, &claimed);
}

static void credentials_check(void)
{
	CHECK(option(s[1], SO_PASSCRED) == 1 && option(s[0], SO_PASSCRED) == 0, "the option is another");
	expect_credentials(s[1], "parent", getpid(), 0, 0);
	expect_credentials(s[1], "child", child, 1000, 1000);
	expect_credentials(s[1], "claimed", getpid(), 33, 44);
	put(s[0], "new");
	expect_credentials(s[1], "new", getpid(), 0, 0);
	expect_exit(child, 0);
}

#define CREDENTIALS(id, type) \
	static void id##_setup(void) { credentials_setup(type); } \
	static void id##_check(void) { credentials_check(); } \
	static void id##_spoil(void) { spoil_drain_1(); } \
	STATE(id)

CREDENTIALS(unix_credentials_stream, SOCK_STREAM)
CREDENTIALS(unix_credentials_datagram, SOCK_DGRAM)
CREDENTIALS(unix_credentials_seqpacket, SOCK_SEQPACKET)

static int credentials_gone_body(void)
{
	MUST(setgid(1000));
	MUST(setuid(1000));
	put(s[0], "gone");
	return 0;
}

static void unix_credentials_of_the_gone_setup(void)
{
	pair(SOCK_DGRAM);
	set_option(s[1], SO_PASSCRED, 1);
	child = in_child(credentials_gone_body);
	expect_exit(child, 0);
	put(s[0], "here");
}

static void unix_credentials_of_the_gone_check(void)
{
	expect_credentials(s[1], "gone", child, 1000, 1000);
	expect_credentials(s[1], "here", getpid(), 0, 0);
	CHECK(kill(child, 0) == -1 && errno == ESRCH, "the process is there again");
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there is a child");
}

static void unix_credentials_of_the_gone_spoil(void) { drain(s[1]); }
STATE(unix_credentials_of_the_gone)

static void unix_credentials_of_a_zombie_setup(void)
{
	siginfo_t info;
	pair(SOCK_STREAM);
	set_option(s[1], SO_PASSCRED, 1);
	child = in_child(credentials_gone_body);
	MUST(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT));
}

static void unix_credentials_of_a_zombie_check(void)
{
	expect_credentials(s[1], "gone", child, 1000, 1000);
	expect_exit(child, 0);
}

static void unix_credentials_of_a_zombie_spoil(void) { drain(s[1]); }
STATE(unix_credentials_of_a_zombie)

static void unix_credentials_none_setup(void)
{
	pair(SOCK_STREAM);
	put(s[0], "before");
	set_option(s[1], SO_PASSCRED, 1);
	put(s[0], "after");
}

static void unix_credentials_none_check(void)
{
	expect_credentials(s[1], "before", 0, 65534, 65534);
	expect_credentials(s[1], "after", getpid(), 0, 0);
}

static void unix_credentials_none_spoil(void) { drain(s[1]); }
STATE(unix_credentials_none)

static int pidfd_body(void)
{
	put(s[0], "child");
	MUST(write(sync_pipe[1], "x", 1));
	for (;;)
		pause();
}

static void unix_pidfd_in_flight_setup(void)
{
	pair(SOCK_SEQPACKET);
	set_option(s[1], SO_PASSPIDFD, 1);
	MUST(pipe(sync_pipe));
	char byte;
	child = in_child(pidfd_body);
	MUST(read(sync_pipe[0], &byte, 1));
}

static void unix_pidfd_in_flight_check(void)
{
	int process = -1;
	get_message(s[1], "child", f, NULL, &process);
	CHECK(process >= 0, "no descriptor of a process");
	CHECK(syscall(SYS_pidfd_send_signal, process, 0, NULL, 0) == 0, "it is of no process");
	MUST(syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0));
	/* It may have ended by itself before. */
	siginfo_t ended;
	MUST(waitid(P_PIDFD, (id_t)process, &ended, WEXITED));
	CHECK(ended.si_pid == child, "it is another process's");
}

static void unix_pidfd_in_flight_spoil(void) { drain(s[1]); }
STATE(unix_pidfd_in_flight)

/* Who is told to be at the other end. */

static int peer_body(void)
{
	gid_t groups[] = {7, 1000, 1001};
	MUST(setgroups(3, groups));
	MUST(setresgid(1, 1000, 1));
	MUST(setresuid(1000, 1000, 1000));
	int fd = connected(SOCK_STREAM, "/tmp/peer");
	MUST(write(sync_pipe[1], "x", 1));
	until_finishing();
	struct ucred peer = peer_of(fd);
	return peer.pid == getppid() && peer.uid == 12 && peer.gid == 0 ? 0 : 1;
}

static void unix_peer_credentials_setup(void)
{
	char byte;
	MUST(pipe(sync_pipe));
	s[0] = bound(SOCK_STREAM, "/tmp/peer");
	MUST(chmod("/tmp/peer", 0777));
	MUST(seteuid(12));
	MUST(listen(s[0], 5));
	MUST(seteuid(0));
	child = in_child(peer_body);
	MUST(read(sync_pipe[0], &byte, 1));
	s[1] = MUST(accept(s[0], NULL, NULL));
}

static void unix_peer_credentials_check(void)
{
	gid_t groups[8];
	socklen_t length = sizeof groups;
	expect_peer(s[1], child, 1000, 1000);
	expect_peer(s[0], getpid(), 12, 0);
	MUST(getsockopt(s[1], SOL_SOCKET, SO_PEERGROUPS, groups, &length));
	CHECK(length == 3 * sizeof(gid_t) && groups[0] == 7 && groups[1] == 1000 && groups[2] == 1001, "the groups are others");
	expect_exit(child, 0);
	CHECK(geteuid() == 0 && getegid() == 0, "this process is somebody else");
}

static void unix_peer_credentials_spoil(void) { s[1] = connected(SOCK_STREAM, "/tmp/peer"); }
STATE(unix_peer_credentials)

static int peer_pair_body(void)
{
	/* The pair was made by the parent, before it changed its user. */
	until_finishing();
	struct ucred peer = peer_of(s[1]);
	return peer.pid == getppid() && peer.uid == 77 ? 0 : 1;
}

static void unix_peer_of_a_pair_setup(void)
{
	MUST(seteuid(77));
	pair(SOCK_STREAM);
	MUST(seteuid(0));
	child = in_child(peer_pair_body);
}

static void unix_peer_of_a_pair_check(void) { expect_peer(s[0], getpid(), 77, 0); expect_exit(child, 0); }
static void unix_peer_of_a_pair_spoil(void) { pair(SOCK_STREAM); }
STATE(unix_peer_of_a_pair)

static int peer_gone_body(void)
{
	MUST(setgid(1000));
	MUST(setuid(1000));
	int fd = connected(SOCK_STREAM, "/tmp/peer");
	put(fd, "left");
	return 0;
}

static void unix_peer_gone_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/peer", 5);
	MUST(chmod("/tmp/peer", 0777));
	child = in_child(peer_gone_body);
	s[1] = MUST(accept(s[0], NULL, NULL));
	expect_exit(child, 0);
}

static void unix_peer_gone_check(void)
{
	expect_peer(s[1], child, 1000, 1000);
	expect_text(s[1], "left");
	expect_end(s[1]);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there is a child");
}

static void unix_peer_gone_spoil(void) { drain(s[1]); }
STATE(unix_peer_gone)

static int peer_zombie_body(void) { connected(SOCK_STREAM, "@peer"); return 0; }

static void unix_peer_zombie_setup(void)
{
	siginfo_t info;
	s[0] = listening(SOCK_STREAM, "@peer", 5);
	child = in_child(peer_zombie_body);
	s[1] = MUST(accept(s[0], NULL, NULL));
	MUST(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT));
}

static void unix_peer_zombie_check(void) { expect_peer(s[1], child, 0, 0); expect_exit(child, 0); expect_end(s[1]); }
static void unix_peer_zombie_spoil(void) { s[1] = connected(SOCK_STREAM, "@peer"); }
STATE(unix_peer_zombie)

static int inherited_body(void) { until_finishing(); put(s[1], "from the child"); return 0; }

static void unix_inherited_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/inherited", 5);
	s[1] = connected(SOCK_STREAM, "/tmp/inherited");
	s[2] = MUST(accept(s[0], NULL, NULL));
	s[3] = MUST(dup(s[2]));
	child = in_child(inherited_body);
	close(s[1]);
}

static void unix_inherited_check(void)
{
	char buffer[32];
	CHECK(recv(s[2], buffer, sizeof buffer, 0) == 14, "nothing comes from the child");
	MUST(fcntl(s[2], F_SETFL, O_NONBLOCK));
	CHECK(fcntl(s[3], F_GETFL) & O_NONBLOCK, "the duplicate is another description");
	expect_exit(child, 0);
	expect_end(s[3]);
}

static void unix_inherited_spoil(void) { close(s[2]); s[2] = connected(SOCK_STREAM, "/tmp/inherited"); fcntl(s[2], F_SETFL, O_NONBLOCK); }
STATE(unix_inherited)

/* Options, and the socket as a file. */

static void unix_options_setup(void)
{
	struct timeval receive = {.tv_sec = 5, .tv_usec = 250000}, send = {.tv_sec = 7};
	s[0] = listening(SOCK_STREAM, "/tmp/options", 3);
	s[1] = connected(SOCK_STREAM, "/tmp/options");
	s[2] = MUST(accept(s[0], NULL, NULL));
	set_option(s[1], SO_SNDBUF, 10000);
	set_option(s[1], SO_RCVBUF, 20000);
	MUST(setsockopt(s[2], SOL_SOCKET, SO_RCVTIMEO, &receive, sizeof receive));
	MUST(setsockopt(s[2], SOL_SOCKET, SO_SNDTIMEO, &send, sizeof send));
	set_option(s[0], SO_PASSCRED, 1);
	set_option(s[2], SO_PASSSEC, 1);
	set_option(s[1], SO_RCVLOWAT, 3);
	struct linger linger = {.l_onoff = 1, .l_linger = 9};
	MUST(setsockopt(s[1], SOL_SOCKET, SO_LINGER, &linger, sizeof linger));
	MUST(fchmod(s[1], 0640));
	MUST(fchown(s[1], 1000, 7));
}

static void unix_options_check(void)
{
	struct timeval receive, send;
	struct linger linger;
	struct stat st;
	socklen_t length = sizeof receive;
	CHECK(option(s[1], SO_SNDBUF) == 20000 && option(s[1], SO_RCVBUF) == 40000, "the buffers are others");
	MUST(getsockopt(s[2], SOL_SOCKET, SO_RCVTIMEO, &receive, &length));
	MUST(getsockopt(s[2], SOL_SOCKET, SO_SNDTIMEO, &send, &length));
	CHECK(receive.tv_sec == 5 && receive.tv_usec >= 250000 && send.tv_sec == 7, "the timeouts are others");
	CHECK(option(s[0], SO_PASSCRED) == 1 && option(s[1], SO_PASSCRED) == 0 && option(s[2], SO_PASSCRED) == 0, "who is told credentials is another");
	CHECK(option(s[2], SO_PASSSEC) == 1, "SO_PASSSEC is another");
	CHECK(option(s[1], SO_RCVLOWAT) == 3, "SO_RCVLOWAT is another");
	length = sizeof linger;
	MUST(getsockopt(s[1], SOL_SOCKET, SO_LINGER, &linger, &length));
	CHECK(linger.l_onoff == 1 && linger.l_linger == 9, "SO_LINGER is another");
	MUST(fstat(s[1], &st));
	CHECK((st.st_mode & 07777) == 0640 && st.st_uid == 1000 && st.st_gid == 7, "mode or owner of the socket are others");
	MUST(fstat(s[2], &st));
	CHECK((st.st_mode & 07777) == 0777 && st.st_uid == 0, "mode or owner of the other socket are others");
	expect_link(s[1], s[2]);
}

static void unix_options_spoil(void) { set_option(s[1], SO_RCVLOWAT, 1); }
STATE(unix_options)

static void unix_peek_offset_setup(void)
{
	char buffer[4];
	pair(SOCK_STREAM);
	set_option(s[1], SO_PEEK_OFF, 2);
	put(s[0], "0123456789");
	MUST(recv(s[1], buffer, 3, MSG_PEEK));
}

static void unix_peek_offset_check(void)
{
	char buffer[16];
	CHECK(option(s[1], SO_PEEK_OFF) == 5, "the position is %d", option(s[1], SO_PEEK_OFF));
	CHECK(recv(s[1], buffer, 2, MSG_PEEK | MSG_DONTWAIT) == 2 && !memcmp(buffer, "56", 2), "it peeks elsewhere");
	expect_text(s[1], "0123456789");
}

static void unix_peek_offset_spoil(void) { set_option(s[1], SO_PEEK_OFF, -1); }
STATE(unix_peek_offset)

/* Urgent bytes. */

static void urgent_setup(void) { pair(SOCK_STREAM); }
static void put_urgent(const char *text) { MUST(send(s[0], text, strlen(text), MSG_OOB)); }

static void expect_urgent(char wanted)
{
	char byte;
	CHECK(recv(s[1], &byte, 1, MSG_OOB | MSG_DONTWAIT) == 1 && byte == wanted, "the urgent byte is another");
}

static void unix_urgent_setup(void) { urgent_setup(); put(s[0], "before"); put_urgent("!"); put(s[0], "after"); }
static void unix_urgent_check(void)
{
	expect_text(s[1], "before");
	int mark = 0;
	MUST(ioctl(s[1], SIOCATMARK, &mark));
	CHECK(mark == 1, "the mark is elsewhere");
	expect_urgent('!');
	expect_text(s[1], "after");
}
static void unix_urgent_spoil(void) { expect_urgent('!'); }
STATE(unix_urgent)

static void unix_urgent_first_setup(void) { urgent_setup(); put_urgent("!"); put(s[0], "after"); }
static void unix_urgent_first_check(void) { expect_urgent('!'); expect_text(s[1], "after"); expect_nothing(s[1]); }
static void unix_urgent_first_spoil(void) { expect_urgent('!'); }
STATE(unix_urgent_first)

static void unix_urgent_inline_setup(void) { urgent_setup(); set_option(s[1], SO_OOBINLINE, 1); put(s[0], "be"); put_urgent("fore!"); put(s[0], "x"); }
static void unix_urgent_inline_check(void)
{
	CHECK(option(s[1], SO_OOBINLINE) == 1, "the option is another");
	expect_text(s[1], "before");
	expect_text(s[1], "!x");
}
static void unix_urgent_inline_spoil(void) { set_option(s[1], SO_OOBINLINE, 0); }
STATE(unix_urgent_inline)

/* Who waits. */

static void *accepting(void *unused)
{
	(void)unused;
	return (void *)(intptr_t)accept(s[0], NULL, NULL);
}

static pthread_t thread;

static void start_thread(void *(*body)(void *))
{
	MUST(-pthread_create(&thread, NULL, body, NULL));
	nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
}

static intptr_t joined(void)
{
	void *result;
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 10;
	CHECK(pthread_timedjoin_np(thread, &result, &until) == 0, "the thread still waits");
	return (intptr_t)result;
}

static void unix_blocked_accept_setup(void) { s[0] = listening(SOCK_STREAM, "/tmp/blocked", 5); start_thread(accepting); }
static void unix_blocked_accept_check(void)
{
	s[1] = connected(SOCK_STREAM, "/tmp/blocked");
	s[2] = (int)joined();
	CHECK(s[2] >= 0, "accept has failed");
	expect_link(s[1], s[2]);
}
static void unix_blocked_accept_spoil(void) { MUST(shutdown(s[0], SHUT_RDWR)); }
STATE(unix_blocked_accept)

static void *receiving(void *unused)
{
	char buffer[16];
	(void)unused;
	return (void *)(intptr_t)recv(s[1], buffer, sizeof buffer, 0);
}

static void unix_blocked_receive_setup(void) { s[0] = bound(SOCK_DGRAM, "@receiver"); s[1] = s[0]; s[2] = connected(SOCK_DGRAM, "@receiver"); start_thread(receiving); }
static void unix_blocked_receive_check(void) { put(s[2], "wake up"); CHECK(joined() == 7, "something else is received"); }
static void unix_blocked_receive_spoil(void) { put(s[2], "early"); }
STATE(unix_blocked_receive)

static void *sending(void *unused)
{
	(void)unused;
	return (void *)(intptr_t)send(s[0], "last", 4, MSG_NOSIGNAL);
}

static void unix_blocked_send_setup(void)
{
	pair(SOCK_STREAM);
	set_option(s[0], SO_SNDBUF, 4608);
	while (send(s[0], "0123456789abcdef", 16, MSG_DONTWAIT) == 16)
		f[0]++;
	start_thread(sending);
}

static void unix_blocked_send_check(void)
{
	char buffer[16];
	int others = 0;
	for (int i = 0; i < f[0]; i++)
		if (recv(s[1], buffer, 16, MSG_DONTWAIT) != 16)
			others++;
	CHECK(others == 0, "%d are missing", others);
	CHECK(joined() == 4, "it was not sent");
	expect_text(s[1], "last");
}

static void unix_blocked_send_spoil(void) { char buffer[64]; MUST(read(s[1], buffer, 16)); }
STATE(unix_blocked_send)

static void *connecting(void *unused)
{
	(void)unused;
	return (void *)(intptr_t)connect_to(s[3], "@full");
}

static void unix_blocked_connect_setup(void)
{
	s[0] = listening(SOCK_STREAM, "@full", 0);
	s[1] = connected(SOCK_STREAM, "@full");
	s[3] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
	start_thread(connecting);
}

static void unix_blocked_connect_check(void)
{
	expect_link(s[1], MUST(accept(s[0], NULL, NULL)));
	CHECK(joined() == 0, "connect has failed");
	expect_link(s[3], MUST(accept(s[0], NULL, NULL)));
}

static void unix_blocked_connect_spoil(void) { MUST(accept(s[0], NULL, NULL)); }
STATE(unix_blocked_connect)

static void unix_epoll_setup(void)
{
	struct epoll_event event = {.events = EPOLLIN};
	f[0] = MUST(epoll_create1(0));
	s[0] = listening(SOCK_STREAM, "/tmp/watched", 5);
	s[1] = connected(SOCK_STREAM, "/tmp/watched");
	s[2] = MUST(accept(s[0], NULL, NULL));
	s[3] = bound(SOCK_DGRAM, "@watched");
	for (int i = 0; i < 4; i++) {
		event.data.u32 = (uint32_t)i;
		event.events = i == 2 ? EPOLLIN | EPOLLET | EPOLLRDHUP : EPOLLIN;
		MUST(epoll_ctl(f[0], EPOLL_CTL_ADD, s[i], &event));
	}
}

static void expect_event(unsigned which, unsigned events)
{
	struct epoll_event event[4];
	int count = epoll_wait(f[0], event, 4, 1000);
	CHECK(count == 1 && event[0].data.u32 == which && event[0].events == events, "%d events, the first of %u: %#x", count, event[0].data.u32, event[0].events);
}

static void unix_epoll_check(void)
{
	struct epoll_event event;
	CHECK(epoll_wait(f[0], &event, 1, 0) == 0, "there is an event of %u: %#x", event.data.u32, event.events);
	put_to(s[3], "x", "@watched");
	expect_event(3, EPOLLIN);
	drain(s[3]);
	int client = connected(SOCK_STREAM, "/tmp/watched");
	expect_event(0, EPOLLIN);
	MUST(accept(s[0], NULL, NULL));
	put(s[1], "y");
	expect_event(2, EPOLLIN);
	MUST(shutdown(s[1], SHUT_WR));
	expect_event(2, EPOLLIN | EPOLLRDHUP);
	close(client);
}

static void unix_epoll_spoil(void) { put(s[2], "early"); }
STATE(unix_epoll)

static void unix_timeout_blocked_setup(void)
{
	struct timeval limit = {.tv_sec = 2};
	pair(SOCK_SEQPACKET);
	MUST(setsockopt(s[1], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
	start_thread(receiving);
}

static void unix_timeout_blocked_check(void) { CHECK(joined() == -1, "something is received"); }
static void unix_timeout_blocked_spoil(void) { put(s[0], "x"); }
STATE(unix_timeout_blocked)
