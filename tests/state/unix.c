/* Unix sockets: names, connections, and how they end. */
#include "unix.h"

static int s[8];
static pid_t child;
static int sync_pipe[2];

/* Listening sockets. */

static void accepts(const char *name, int type)
{
	expect_name(s[0], false, name);
	CHECK(option(s[0], SO_ACCEPTCONN) == 1, "it does not listen");
	int client = socket(AF_UNIX, type, 0);
	CHECK(connect_to(client, name) == 0, "nobody is found at %s", name);
	int server = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
	expect_link(client, server);
	expect_name(server, false, name);
	expect_name(client, true, name);
}

static void spoil_close_0(void) { close(s[0]); }

#define LISTENS(id, type, name) \
	static void id##_setup(void) { s[0] = listening(type, name, 5); } \
	static void id##_check(void) { accepts(name, type); } \
	static void id##_spoil(void) { spoil_close_0(); } \
	STATE(id)

LISTENS(unix_listen_path_stream, SOCK_STREAM, "/tmp/listen")
LISTENS(unix_listen_path_seqpacket, SOCK_SEQPACKET, "/tmp/listen")
LISTENS(unix_listen_abstract_stream, SOCK_STREAM, "@listen")
LISTENS(unix_listen_abstract_seqpacket, SOCK_SEQPACKET, "@listen")
LISTENS(unix_listen_on_tmpfs, SOCK_STREAM, "/dev/shm/listen")
LISTENS(unix_listen_in_dev, SOCK_STREAM, "/dev/log")
LISTENS(unix_listen_relative, SOCK_STREAM, "listen")
LISTENS(unix_listen_dotted, SOCK_STREAM, "./tmp/../tmp//listen")
LISTENS(unix_listen_longest, SOCK_STREAM, "/tmp/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789ab")

static void unix_listen_relative_moved_setup(void)
{
	MUST(mkdir("/tmp/there", 0700));
	MUST(chdir("/tmp/there"));
	s[0] = listening(SOCK_STREAM, "sock", 5);
	MUST(chdir("/"));
}

static void unix_listen_relative_moved_check(void)
{
	expect_name(s[0], false, "sock");
	int client = connected(SOCK_STREAM, "/tmp/there/sock");
	int server = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
	expect_link(client, server);
	expect_name(server, false, "sock");
	expect_name(client, true, "sock");
}

static void unix_listen_relative_moved_spoil(void) { spoil_close_0(); s[0] = listening(SOCK_STREAM, "/tmp/other", 5); }
STATE(unix_listen_relative_moved)

static void unix_listen_below_dev_setup(void) { MUST(mkdir("/dev/made", 0755)); MUST(mkdir("/dev/made/here", 0755)); s[0] = listening(SOCK_STREAM, "/dev/made/here/sock", 5); }
static void unix_listen_below_dev_check(void) { accepts("/dev/made/here/sock", SOCK_STREAM); }
static void unix_listen_below_dev_spoil(void) { spoil_close_0(); }
STATE(unix_listen_below_dev)

static void unix_listen_renamed_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/before", 5);
	MUST(mkdir("/tmp/dir", 0755));
	MUST(rename("/tmp/before", "/tmp/dir/after"));
}

static void unix_listen_renamed_check(void)
{
	expect_name(s[0], false, "/tmp/before");
	CHECK(access("/tmp/before", F_OK) == -1, "the old name is there");
	int client = connected(SOCK_STREAM, "/tmp/dir/after");
	int server = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
	expect_link(client, server);
}

static void unix_listen_renamed_spoil(void) { MUST(rename("/tmp/dir/after", "/tmp/before")); }
STATE(unix_listen_renamed)

static void unix_listen_directory_renamed_setup(void)
{
	MUST(mkdir("/tmp/old", 0755));
	s[0] = listening(SOCK_STREAM, "/tmp/old/sock", 5);
	MUST(rename("/tmp/old", "/tmp/new"));
}

static void unix_listen_directory_renamed_check(void)
{
	expect_name(s[0], false, "/tmp/old/sock");
	int client = connected(SOCK_STREAM, "/tmp/new/sock");
	int server = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
	expect_link(client, server);
}

static void unix_listen_directory_renamed_spoil(void) { MUST(unlink("/tmp/new/sock")); s[0] = listening(SOCK_STREAM, "/tmp/new/sock", 1); }
STATE(unix_listen_directory_renamed)

static void unix_listen_unlinked_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/gone", 5);
	s[1] = connected(SOCK_STREAM, "/tmp/gone");
	s[2] = MUST(accept(s[0], NULL, NULL));
	MUST(unlink("/tmp/gone"));
}

static void unix_listen_unlinked_check(void)
{
	expect_name(s[0], false, "/tmp/gone");
	CHECK(access("/tmp/gone", F_OK) == -1, "the node is there");
	CHECK(option(s[0], SO_ACCEPTCONN) == 1, "it does not listen");
	expect_link(s[1], s[2]);
	expect_name(s[1], true, "/tmp/gone");
	/* The path is free for another. */
	int again = listening(SOCK_STREAM, "/tmp/gone", 5);
	int client = connected(SOCK_STREAM, "/tmp/gone");
	MUST(accept(again, NULL, NULL));
	close(client);
}

static void unix_listen_unlinked_spoil(void) { close(s[2]); }
STATE(unix_listen_unlinked)

static void unix_listen_replaced_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/same", 5);
	s[1] = connected(SOCK_STREAM, "/tmp/same");
	MUST(unlink("/tmp/same"));
	s[2] = listening(SOCK_STREAM, "/tmp/same", 5);
	s[3] = connected(SOCK_STREAM, "/tmp/same");
}

static void unix_listen_replaced_check(void)
{
	int old = MUST(accept(s[0], NULL, NULL)), new = MUST(accept(s[2], NULL, NULL));
	expect_link(s[1], old);
	expect_link(s[3], new);
	int client = connected(SOCK_STREAM, "/tmp/same");
	expect_link(client, MUST(accept(s[2], NULL, NULL)));
}

static void unix_listen_replaced_spoil(void) { MUST(unlink("/tmp/same")); }
STATE(unix_listen_replaced)

static void unix_node_metadata_setup(void)
{
	umask(0);
	s[0] = listening(SOCK_STREAM, "/tmp/node", 5);
	MUST(chown("/tmp/node", 1000, 7));
	MUST(chmod("/tmp/node", 0640));
	struct timespec times[2] = {{.tv_sec = 1000}, {.tv_sec = 2000, .tv_nsec = 5}};
	MUST(utimensat(AT_FDCWD, "/tmp/node", times, 0));
}

static void unix_node_metadata_check(void)
{
	struct stat st;
	MUST(lstat("/tmp/node", &st));
	CHECK(S_ISSOCK(st.st_mode) && (st.st_mode & 07777) == 0640, "the mode is %o", st.st_mode);
	CHECK(st.st_uid == 1000 && st.st_gid == 7, "the owner is %u:%u", st.st_uid, st.st_gid);
	CHECK(st.st_mtim.tv_sec == 2000 && st.st_mtim.tv_nsec == 5, "the time is another");
	accepts("/tmp/node", SOCK_STREAM);
	CHECK(access("/tmp/.samara", F_OK) == -1, "something was left");
}

static void unix_node_metadata_spoil(void) { MUST(chmod("/tmp/node", 0600)); }
STATE(unix_node_metadata)

static void unix_autobind_setup(void)
{
	s[0] = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
	sa_family_t family = AF_UNIX;
	MUST(bind(s[0], (struct sockaddr *)&family, sizeof family));
}

static void autobound_name(char *name)
{
	struct sockaddr_un at;
	socklen_t length = sizeof at;
	MUST(getsockname(s[0], (struct sockaddr *)&at, &length));
	CHECK(length == sizeof(sa_family_t) + 6 && at.sun_path[0] == 0, "it has no name of autobind");
	sprintf(name, "@%.5s", at.sun_path + 1);
}

static void unix_autobind_check(void)
{
	char name[16];
	autobound_name(name);
	int other = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
	put_to(other, "found", name);
	expect_from(s[0], "found", NULL);
}

static void unix_autobind_spoil(void) { close(s[0]); s[0] = MUST(socket(AF_UNIX, SOCK_DGRAM, 0)); }
STATE(unix_autobind)

static const char binary_name[] = {0, 'a', 0, (char)0xff, '\n', 0, 0};

static void unix_abstract_binary_setup(void)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	memcpy(at.sun_path, binary_name, sizeof binary_name);
	s[0] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
	MUST(bind(s[0], (struct sockaddr *)&at, sizeof(sa_family_t) + sizeof binary_name));
	MUST(listen(s[0], 1));
}

static void unix_abstract_binary_check(void)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX}, got;
	memcpy(at.sun_path, binary_name, sizeof binary_name);
	socklen_t length = sizeof got;
	MUST(getsockname(s[0], (struct sockaddr *)&got, &length));
	CHECK(length == sizeof(sa_family_t) + sizeof binary_name && !memcmp(got.sun_path, binary_name, sizeof binary_name), "the name is another");
	int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
	CHECK(connect(client, (struct sockaddr *)&at, length) == 0, "nobody is found");
	expect_link(client, MUST(accept(s[0], NULL, NULL)));
}

static void unix_abstract_binary_spoil(void) { spoil_close_0(); }
STATE(unix_abstract_binary)

static void unix_abstract_one_name_three_kinds_setup(void)
{
	s[0] = listening(SOCK_STREAM, "@kinds", 1);
	s[1] = listening(SOCK_SEQPACKET, "@kinds", 1);
	s[2] = bound(SOCK_DGRAM, "@kinds");
}

static void unix_abstract_one_name_three_kinds_check(void)
{
	int client = connected(SOCK_STREAM, "@kinds");
	expect_link(client, MUST(accept(s[0], NULL, NULL)));
	client = connected(SOCK_SEQPACKET, "@kinds");
	expect_link(client, MUST(accept(s[1], NULL, NULL)));
	client = connected(SOCK_DGRAM, "@kinds");
	put(client, "one");
	expect_text(s[2], "one");
}

static void unix_abstract_one_name_three_kinds_spoil(void) { close(s[1]); s[1] = listening(SOCK_SEQPACKET, "@others", 1); }
STATE(unix_abstract_one_name_three_kinds)

static void unix_bound_not_listening_setup(void) { s[0] = bound(SOCK_STREAM, "/tmp/idle"); s[1] = bound(SOCK_STREAM, "@idle"); }

static void unix_bound_not_listening_check(void)
{
	for (int i = 0; i < 2; i++) {
		const char *name = i ? "@idle" : "/tmp/idle";
		int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
		CHECK(connect_to(client, name) == -1 && errno == ECONNREFUSED, "it listens already");
		MUST(listen(s[i], 1));
		MUST(connect_to(client, name));
		expect_link(client, MUST(accept(s[i], NULL, NULL)));
	}
}

static void unix_bound_not_listening_spoil(void) { MUST(listen(s[1], 1)); }
STATE(unix_bound_not_listening)

static void unix_fresh_setup(void)
{
	s[0] = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
	s[1] = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
	s[2] = MUST(socket(AF_UNIX, SOCK_SEQPACKET, 0));
}

static void unix_fresh_check(void)
{
	CHECK((MUST(fcntl(s[0], F_GETFL)) & O_NONBLOCK) && (MUST(fcntl(s[0], F_GETFD)) & FD_CLOEXEC), "the flags are others");
	CHECK(!(MUST(fcntl(s[1], F_GETFL)) & O_NONBLOCK), "the second does not wait");
	for (int i = 0; i < 3; i++) {
		struct sockaddr_un at;
		socklen_t length = sizeof at;
		expect_name(s[i], false, NULL);
		CHECK(getpeername(s[i], (struct sockaddr *)&at, &length) == -1 && errno == ENOTCONN, "it is connected");
	}
	struct ucred peer = peer_of(s[0]);
	CHECK(peer.pid == 0 && peer.uid == (uid_t)-1, "it has a peer");
	CHECK(option(s[0], SO_TYPE) == SOCK_STREAM && option(s[1], SO_TYPE) == SOCK_DGRAM && option(s[2], SO_TYPE) == SOCK_SEQPACKET, "the types are others");
	int listener = listening(SOCK_STREAM, "@fresh", 1);
	MUST(connect_to(s[0], "@fresh"));
	expect_link(s[0], MUST(accept(listener, NULL, NULL)));
}

static void unix_fresh_spoil(void) { MUST(fcntl(s[0], F_SETFL, 0)); }
STATE(unix_fresh)

/* Connections that wait to be accepted. */

static void unix_waiting_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/waiting", 5);
	for (int i = 1; i < 4; i++)
		s[i] = connected(SOCK_STREAM, "/tmp/waiting");
}

static void unix_waiting_check(void)
{
	for (int i = 1; i < 4; i++) {
		int server = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
		expect_peer(server, getpid(), 0, 0);
		expect_name(server, true, NULL);
		expect_link(s[i], server);
		for (int other = i + 1; other < 4; other++)
			expect_nothing(s[other]);
	}
	fcntl(s[0], F_SETFL, O_NONBLOCK);
	CHECK(accept(s[0], NULL, NULL) == -1 && errno == EAGAIN, "there are more");
}

static void unix_waiting_spoil(void) { int swap = s[1]; s[1] = s[2]; s[2] = swap; }
STATE(unix_waiting)

static void unix_waiting_abstract_seqpacket_setup(void)
{
	s[0] = listening(SOCK_SEQPACKET, "@waiting", 5);
	s[1] = bound(SOCK_SEQPACKET, "@client");
	MUST(connect_to(s[1], "@waiting"));
	s[2] = connected(SOCK_SEQPACKET, "@waiting");
	MUST(shutdown(s[2], SHUT_WR));
}

static void unix_waiting_abstract_seqpacket_check(void)
{
	int first = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK)), second = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
	expect_name(first, true, "@client");
	expect_link(first, s[1]);
	expect_end(second);
	put(second, "still");
	expect_text(s[2], "still");
}

static void unix_waiting_abstract_seqpacket_spoil(void) { close(s[1]); s[1] = -1; }
STATE(unix_waiting_abstract_seqpacket)

static void unix_backlog_full_setup(void)
{
	s[0] = listening(SOCK_STREAM, "@full", 1);
	s[1] = connected(SOCK_STREAM, "@full");
	s[2] = connected(SOCK_STREAM, "@full");
	s[3] = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
	CHECK(connect_to(s[3], "@full") == -1 && errno == EAGAIN, "there is room");
}

static void unix_backlog_full_check(void)
{
	CHECK(connect_to(s[3], "@full") == -1 && errno == EAGAIN, "there is room");
	expect_link(s[1], MUST(accept(s[0], NULL, NULL)));
	MUST(connect_to(s[3], "@full"));
	expect_link(s[2], MUST(accept(s[0], NULL, NULL)));
	expect_link(s[3], MUST(accept(s[0], NULL, NULL)));
}

static void unix_backlog_full_spoil(void) { MUST(accept(s[0], NULL, NULL)); }
STATE(unix_backlog_full)

static int waiting_other_user_body(void)
{
	gid_t groups[] = {7, 1000};
	MUST(setgroups(2, groups));
	MUST(setgid(1000));
	MUST(setuid(1000));
	int fd = connected(SOCK_STREAM, "/tmp/waiting");
	MUST(write(sync_pipe[1], "x", 1));
	char byte;
	if (read(fd, &byte, 1) != 1 || byte != 'g')
		return 1;
	return 0;
}

static void unix_waiting_other_user_setup(void)
{
	char byte;
	s[0] = listening(SOCK_STREAM, "/tmp/waiting", 5);
	MUST(chmod("/tmp/waiting", 0777));
	MUST(pipe(sync_pipe));
	child = in_child(waiting_other_user_body);
	MUST(read(sync_pipe[0], &byte, 1));
}

static void unix_waiting_other_user_check(void)
{
	int server = MUST(accept(s[0], NULL, NULL));
	expect_peer(server, child, 1000, 1000);
	put(server, "go");
	expect_exit(child, 0);
}

static void unix_waiting_other_user_spoil(void) { MUST(accept(s[0], NULL, NULL)); s[1] = connected(SOCK_STREAM, "/tmp/waiting"); }
STATE(unix_waiting_other_user)

/* Connected streams. */

static void connect_stream(const char *name, int type)
{
	s[0] = listening(type, name, 5);
	s[1] = connected(type, name);
	s[2] = MUST(accept4(s[0], NULL, NULL, SOCK_NONBLOCK));
}

static void stream_check(const char *name)
{
	expect_text(s[2], "to the server");
	expect_text(s[1], "to the client");
	expect_nothing(s[1]);
	expect_nothing(s[2]);
	expect_link(s[1], s[2]);
	expect_name(s[2], false, name);
	expect_name(s[1], true, name);
	expect_name(s[1], false, NULL);
	expect_name(s[2], true, NULL);
	expect_peer(s[1], getpid(), 0, 0);
	expect_peer(s[2], getpid(), 0, 0);
}

#define STREAM(id, type, name, then) \
	static void id##_setup(void) { connect_stream(name, type); put(s[1], "to the server"); put(s[2], "to the client"); then; } \
	static void id##_check(void) { stream_check(name); } \
	static void id##_spoil(void) { drain(s[1]); } \
	STATE(id)

STREAM(unix_stream_path, SOCK_STREAM, "/tmp/stream", (void)0)
STREAM(unix_stream_abstract, SOCK_STREAM, "@stream", (void)0)
STREAM(unix_seqpacket_path, SOCK_SEQPACKET, "/tmp/stream", (void)0)
STREAM(unix_seqpacket_abstract, SOCK_SEQPACKET, "@stream", (void)0)
STREAM(unix_stream_listener_closed, SOCK_STREAM, "/tmp/stream", close(s[0]))
STREAM(unix_stream_listener_closed_abstract, SOCK_STREAM, "@stream", close(s[0]))
STREAM(unix_stream_listener_closed_node_removed, SOCK_STREAM, "/tmp/stream", (close(s[0]), unlink("/tmp/stream")))
STREAM(unix_stream_listener_replaced_abstract, SOCK_STREAM, "@stream", (close(s[0]), s[0] = listening(SOCK_STREAM, "@stream", 1)))
STREAM(unix_stream_name_is_datagram_now, SOCK_STREAM, "/tmp/stream", (close(s[0]), unlink("/tmp/stream"), s[0] = bound(SOCK_DGRAM, "/tmp/stream")))

static void unix_stream_both_named_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/server", 5);
	s[1] = bound(SOCK_STREAM, "/tmp/client");
	MUST(connect_to(s[1], "/tmp/server"));
	s[2] = MUST(accept(s[0], NULL, NULL));
	put(s[1], "x");
}

static void unix_stream_both_named_check(void)
{
	struct sockaddr_un at;
	expect_name(s[1], false, "/tmp/client");
	expect_name(s[2], true, "/tmp/client");
	expect_name(s[2], false, "/tmp/server");
	expect_text(s[2], "x");
	expect_link(s[1], s[2]);
	int again = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
	socklen_t length = address(&at, "/tmp/client");
	CHECK(bind(again, (struct sockaddr *)&at, length) == -1 && errno == EADDRINUSE, "the client's node is gone");
}

static void unix_stream_both_named_spoil(void) { close(s[1]); s[1] = connected(SOCK_STREAM, "/tmp/server"); }
STATE(unix_stream_both_named)

static void unix_stream_many_setup(void)
{
	s[0] = listening(SOCK_STREAM, "/tmp/many", 5);
	for (int i = 1; i < 7; i += 2) {
		s[i] = connected(SOCK_STREAM, "/tmp/many");
		s[i + 1] = MUST(accept(s[0], NULL, NULL));
		char text[2] = {(char)('a' + i), 0};
		put(s[i], text);
	}
	s[7] = connected(SOCK_STREAM, "/tmp/many");
}

static void unix_stream_many_check(void)
{
	for (int i = 1; i < 7; i += 2) {
		char text[2] = {(char)('a' + i), 0};
		expect_text(s[i + 1], text);
		expect_link(s[i], s[i + 1]);
	}
	expect_link(s[7], MUST(accept(s[0], NULL, NULL)));
}

static void unix_stream_many_spoil(void) { int swap = s[2]; s[2] = s[4]; s[4] = swap; }
STATE(unix_stream_many)

static void unix_stream_large_queue_setup(void)
{
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s));
	set_option(s[0], SO_SNDBUF, 200000);
	char block[1000];
	for (int i = 0; i < 100; i++) {
		memset(block, i, sizeof block);
		MUST(send(s[0], block, sizeof block, MSG_DONTWAIT));
	}
}

static void unix_stream_large_queue_check(void)
{
	char block[1000];
	for (int i = 0; i < 100; i++) {
		CHECK(recv(s[1], block, sizeof block, MSG_WAITALL | MSG_DONTWAIT) == sizeof block, "block %d is missing", i);
		CHECK(block[0] == (char)i && block[999] == (char)i, "block %d is another", i);
	}
	expect_nothing(s[1]);
	CHECK(option(s[0], SO_SNDBUF) == 400000, "the buffer is another");
}

static void unix_stream_large_queue_spoil(void) { char block[10]; MUST(read(s[1], block, sizeof block)); }
STATE(unix_stream_large_queue)

static void unix_stream_full_setup(void)
{
	char block[1000] = {0};
	connect_stream("@full", SOCK_STREAM);
	set_option(s[1], SO_SNDBUF, 4096);
	while (send(s[1], block, sizeof block, MSG_DONTWAIT) > 0)
		s[3]++;
}

static void unix_stream_full_check(void)
{
	char block[1000] = {0};
	struct pollfd watched = {.fd = s[1], .events = POLLOUT};
	CHECK(send(s[1], block, sizeof block, MSG_DONTWAIT) == -1 && errno == EAGAIN, "there is room");
	CHECK(poll(&watched, 1, 0) == 0, "it says that there is room");
	while (recv(s[2], block, sizeof block, MSG_DONTWAIT) > 0)
		;
	CHECK(poll(&watched, 1, 0) == 1, "it says that there is no room");
}

static void unix_stream_full_spoil(void) { drain(s[2]); }
STATE(unix_stream_full)

static void unix_seqpacket_boundaries_setup(void)
{
	connect_stream("@packets", SOCK_SEQPACKET);
	put(s[1], "one");
	put(s[1], "second");
	MUST(send(s[1], "", 0, 0));
	put(s[1], "4");
	put(s[2], "back");
	put(s[2], "again");
}

static void unix_seqpacket_boundaries_check(void)
{
	char byte;
	expect_text(s[2], "one");
	expect_text(s[2], "second");
	CHECK(recv(s[2], &byte, 1, MSG_DONTWAIT) == 0, "the empty message is missing");
	expect_text(s[2], "4");
	expect_nothing(s[2]);
	expect_text(s[1], "back");
	expect_text(s[1], "again");
	expect_link(s[1], s[2]);
}

static void unix_seqpacket_boundaries_spoil(void) { put(s[1], "5"); }
STATE(unix_seqpacket_boundaries)

/* Ends. */

static void unix_half_closed_setup(void)
{
	connect_stream("/tmp/half", SOCK_STREAM);
	put(s[1], "last");
	MUST(shutdown(s[1], SHUT_WR));
}

static void unix_half_closed_check(void)
{
	expect_text(s[2], "last");
	expect_end(s[2]);
	put(s[2], "answer");
	expect_text(s[1], "answer");
	CHECK(send(s[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it can send");
}

static void unix_half_closed_spoil(void) { drain(s[2]); }
STATE(unix_half_closed)

static void unix_read_shut_setup(void) { connect_stream("@shut", SOCK_SEQPACKET); put(s[1], "x"); MUST(shutdown(s[2], SHUT_RD)); }

static void unix_read_shut_check(void)
{
	expect_text(s[2], "x");
	expect_end(s[2]);
	CHECK(send(s[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "the other can send");
	put(s[2], "this way");
	expect_text(s[1], "this way");
}

static void unix_read_shut_spoil(void) { drain(s[2]); }
STATE(unix_read_shut)

static void unix_both_shut_setup(void) { MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s)); put(s[0], "y"); MUST(shutdown(s[0], SHUT_RDWR)); }

static void unix_both_shut_check(void)
{
	expect_text(s[1], "y");
	expect_end(s[1]);
	expect_end(s[0]);
	CHECK(send(s[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it can send");
}

static void unix_both_shut_spoil(void) { drain(s[1]); }
STATE(unix_both_shut)

static void unix_peer_closed_setup(void) { connect_stream("/tmp/closed", SOCK_STREAM); put(s[2], "rest"); close(s[2]); }

static void unix_peer_closed_check(void)
{
	struct pollfd watched = {.fd = s[1], .events = POLLIN | POLLOUT};
	CHECK(poll(&watched, 1, 0) == 1 && (watched.revents & POLLHUP) && !(watched.revents & POLLERR), "events are %#x", watched.revents);
	expect_name(s[1], true, "/tmp/closed");
	expect_text(s[1], "rest");
	expect_end(s[1]);
	CHECK(send(s[1], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "it can send");
	expect_peer(s[1], getpid(), 0, 0);
}

static void unix_peer_closed_spoil(void) { drain(s[1]); }
STATE(unix_peer_closed)

static void unix_client_closed_setup(void) { connect_stream("@closed", SOCK_STREAM); put(s[1], "rest"); close(s[1]); }
static void unix_client_closed_check(void)
{
	expect_name(s[2], false, "@closed");
	expect_name(s[2], true, NULL);
	expect_text(s[2], "rest");
	expect_end(s[2]);
	expect_peer(s[2], getpid(), 0, 0);
}
static void unix_client_closed_spoil(void) { drain(s[2]); }
STATE(unix_client_closed)

static void unix_reset_setup(void) { connect_stream("/tmp/reset", SOCK_STREAM); put(s[1], "never read"); put(s[2], "read"); close(s[2]); }

static void unix_reset_check(void)
{
	char byte;
	struct pollfd watched = {.fd = s[1], .events = POLLIN};
	CHECK(poll(&watched, 1, 0) == 1 && (watched.revents & POLLERR), "no error waits");
	expect_text(s[1], "read");
	CHECK(recv(s[1], &byte, 1, 0) == -1 && errno == ECONNRESET, "the connection was not reset");
	expect_end(s[1]);
}

static void unix_reset_spoil(void) { option(s[1], SO_ERROR); }
STATE(unix_reset)

static void unix_reset_pair_setup(void) { MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, s)); put(s[0], "never read"); close(s[1]); }
static void unix_reset_pair_check(void) { CHECK(option(s[0], SO_ERROR) == ECONNRESET, "no error waits"); expect_end(s[0]); }
static void unix_reset_pair_spoil(void) { option(s[0], SO_ERROR); }
STATE(unix_reset_pair)

static void unix_reset_taken_setup(void) { unix_reset_setup(); expect_text(s[1], "read"); CHECK(option(s[1], SO_ERROR) == ECONNRESET, "no error"); }
static void unix_reset_taken_check(void) { CHECK(option(s[1], SO_ERROR) == 0, "an error waits again"); expect_end(s[1]); }
static void unix_reset_taken_spoil(void) { MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, s)); }
STATE(unix_reset_taken)

static void unix_seqpacket_peer_closed_setup(void) { connect_stream("@packets", SOCK_SEQPACKET); put(s[2], "a"); put(s[2], "b"); close(s[2]); }
static void unix_seqpacket_peer_closed_check(void) { expect_text(s[1], "a"); expect_text(s[1], "b"); expect_end(s[1]); expect_end(s[1]); }
static void unix_seqpacket_peer_closed_spoil(void) { drain(s[1]); }
STATE(unix_seqpacket_peer_closed)

/* Datagrams. */

static void unix_datagram_queue_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "/tmp/server");
	s[1] = bound(SOCK_DGRAM, "/tmp/one");
	s[2] = bound(SOCK_DGRAM, "@two");
	s[3] = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
	put_to(s[1], "first", "/tmp/server");
	put_to(s[3], "second", "/tmp/server");
	put_to(s[2], "third", "/tmp/server");
	put_to(s[1], "", "/tmp/server");
	put_to(s[1], "fourth", "/tmp/server");
	int closed = bound(SOCK_DGRAM, "/tmp/closed");
	put_to(closed, "fifth", "/tmp/server");
	close(closed);
	MUST(unlink("/tmp/closed"));
	closed = bound(SOCK_DGRAM, "@closed");
	put_to(closed, "sixth", "/tmp/server");
	close(closed);
}

static void unix_datagram_queue_check(void)
{
	expect_from(s[0], "first", "/tmp/one");
	expect_from(s[0], "second", NULL);
	expect_from(s[0], "third", "@two");
	expect_from(s[0], "", "/tmp/one");
	expect_from(s[0], "fourth", "/tmp/one");
	expect_from(s[0], "fifth", "/tmp/closed");
	expect_from(s[0], "sixth", "@closed");
	expect_nothing(s[0]);
	put_to(s[0], "answer", "@two");
	expect_from(s[2], "answer", "/tmp/server");
	bound(SOCK_DGRAM, "@closed");
}

static void unix_datagram_queue_spoil(void) { drain(s[0]); }
STATE(unix_datagram_queue)

static void unix_datagram_clients_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "/tmp/server");
	for (int i = 1; i < 4; i++) {
		s[i] = connected(SOCK_DGRAM, "/tmp/server");
		char text[2] = {(char)('0' + i), 0};
		put(s[i], text);
	}
}

static void unix_datagram_clients_check(void)
{
	for (int i = 1; i < 4; i++) {
		char text[2] = {(char)('0' + i), 0};
		expect_from(s[0], text, NULL);
		expect_name(s[i], true, "/tmp/server");
	}
	for (int i = 1; i < 4; i++) {
		put(s[i], "more");
		expect_text(s[0], "more");
	}
	struct sockaddr_un at;
	socklen_t length = sizeof at;
	CHECK(getpeername(s[0], (struct sockaddr *)&at, &length) == -1, "the server is connected");
}

static void unix_datagram_clients_spoil(void) { close(s[2]); s[2] = MUST(socket(AF_UNIX, SOCK_DGRAM, 0)); }
STATE(unix_datagram_clients)

/* Several are connected to a socket that is closed. */
static void unix_datagram_server_closed_setup(void)
{
	int server = bound(SOCK_DGRAM, "@closed server");
	s[0] = connected(SOCK_DGRAM, "@closed server");
	s[1] = connected(SOCK_DGRAM, "@closed server");
	close(server);
}
static void unix_datagram_server_closed_check(void)
{
	for (int i = 0; i < 2; i++) {
		expect_name(s[i], true, "@closed server");
		CHECK(send(s[i], "x", 1, MSG_NOSIGNAL) == -1 && errno == ECONNREFUSED, "somebody receives");
	}
	close(bound(SOCK_DGRAM, "@closed server"));
}
static void unix_datagram_server_closed_spoil(void) { bound(SOCK_DGRAM, "@closed server"); }
STATE(unix_datagram_server_closed)

static void unix_datagram_self_setup(void) { s[0] = bound(SOCK_DGRAM, "@self"); MUST(connect_to(s[0], "@self")); put(s[0], "me"); }
static void unix_datagram_self_check(void) { expect_name(s[0], true, "@self"); expect_from(s[0], "me", "@self"); put(s[0], "again"); expect_from(s[0], "again", "@self"); }
static void unix_datagram_self_spoil(void) { drain(s[0]); }
STATE(unix_datagram_self)

static void unix_datagram_mutual_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "/tmp/a");
	s[1] = bound(SOCK_DGRAM, "/tmp/b");
	MUST(connect_to(s[0], "/tmp/b"));
	MUST(connect_to(s[1], "/tmp/a"));
	put(s[0], "to b");
	put(s[1], "to a");
	s[2] = bound(SOCK_DGRAM, "/tmp/c");
}

static void unix_datagram_mutual_check(void)
{
	struct sockaddr_un at;
	socklen_t length = address(&at, "/tmp/a");
	expect_from(s[1], "to b", "/tmp/a");
	expect_from(s[0], "to a", "/tmp/b");
	CHECK(sendto(s[2], "x", 1, 0, (struct sockaddr *)&at, length) == -1 && errno == EPERM, "somebody else may send");
	expect_link(s[0], s[1]);
	CHECK(option(s[0], SO_ERROR) == 0, "an error waits");
}

static void unix_datagram_mutual_spoil(void) { MUST(connect_to(s[0], "/tmp/c")); }
STATE(unix_datagram_mutual)

static void unix_datagram_mutual_many_setup(void)
{
	s[2] = bound(SOCK_DGRAM, "/tmp/c");
	s[0] = bound(SOCK_DGRAM, "/tmp/a");
	s[1] = bound(SOCK_DGRAM, "/tmp/b");
	put_to(s[2], "early", "/tmp/a");
	MUST(connect_to(s[0], "/tmp/b"));
	MUST(connect_to(s[1], "/tmp/a"));
	for (int i = 0; i < 40; i++)
		MUST(send(s[1], "many", 4, MSG_DONTWAIT));
}

static void unix_datagram_mutual_many_check(void)
{
	expect_from(s[0], "early", "/tmp/c");
	for (int i = 0; i < 40; i++)
		expect_from(s[0], "many", "/tmp/b");
	expect_nothing(s[0]);
	expect_link(s[0], s[1]);
}

static void unix_datagram_mutual_many_spoil(void) { drain(s[0]); }
STATE(unix_datagram_mutual_many)

static void unix_datagram_connected_after_queued_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "/tmp/a");
	s[1] = bound(SOCK_DGRAM, "/tmp/b");
	s[2] = bound(SOCK_DGRAM, "/tmp/c");
	put_to(s[2], "early", "/tmp/a");
	MUST(connect_to(s[0], "/tmp/b"));
	put_to(s[1], "late", "/tmp/a");
}

static void unix_datagram_connected_after_queued_check(void)
{
	expect_from(s[0], "early", "/tmp/c");
	expect_from(s[0], "late", "/tmp/b");
	expect_name(s[0], true, "/tmp/b");
}

static void unix_datagram_connected_after_queued_spoil(void) { drain(s[0]); }
STATE(unix_datagram_connected_after_queued)

static void unix_datagram_server_gone_setup(void)
{
	int server = bound(SOCK_DGRAM, "/tmp/gone");
	s[0] = connected(SOCK_DGRAM, "/tmp/gone");
	close(server);
	MUST(unlink("/tmp/gone"));
}

static void unix_datagram_server_gone_check(void)
{
	expect_name(s[0], true, "/tmp/gone");
	CHECK(send(s[0], "x", 1, 0) == -1 && errno == ECONNREFUSED, "somebody is there");
	CHECK(send(s[0], "x", 1, 0) == -1 && errno == ENOTCONN, "it is connected");
}

static void unix_datagram_server_gone_spoil(void) { send(s[0], "x", 1, 0); }
STATE(unix_datagram_server_gone)

static void unix_datagram_unlinked_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "/tmp/unlinked");
	s[1] = connected(SOCK_DGRAM, "/tmp/unlinked");
	MUST(unlink("/tmp/unlinked"));
	put(s[1], "x");
}

static void unix_datagram_unlinked_check(void)
{
	expect_text(s[0], "x");
	put(s[1], "y");
	expect_text(s[0], "y");
	CHECK(access("/tmp/unlinked", F_OK) == -1, "the node is there");
}

static void unix_datagram_unlinked_spoil(void) { drain(s[0]); }
STATE(unix_datagram_unlinked)

static void unix_datagram_pair_setup(void)
{
	MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, s));
	put(s[0], "over");
	put(s[0], "there");
	put(s[1], "here");
}

static void unix_datagram_pair_check(void)
{
	expect_from(s[1], "over", NULL);
	expect_from(s[1], "there", NULL);
	expect_from(s[0], "here", NULL);
	expect_link(s[0], s[1]);
	expect_peer(s[0], getpid(), 0, 0);
}

static void unix_datagram_pair_spoil(void) { drain(s[1]); }
STATE(unix_datagram_pair)

static void unix_datagram_pair_closed_setup(void) { unix_datagram_pair_setup(); close(s[0]); }
static void unix_datagram_pair_closed_check(void)
{
	expect_text(s[1], "over");
	expect_text(s[1], "there");
	expect_nothing(s[1]);
	CHECK(send(s[1], "x", 1, 0) == -1 && errno == ECONNREFUSED, "somebody is there");
}
static void unix_datagram_pair_closed_spoil(void) { drain(s[1]); }
STATE(unix_datagram_pair_closed)

static void unix_datagram_pair_bound_setup(void)
{
	struct sockaddr_un at;
	MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, s));
	MUST(bind(s[0], (struct sockaddr *)&at, address(&at, "@bound")));
	put(s[0], "named");
	s[2] = bound(SOCK_DGRAM, "@away");
	MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, s + 3));
	MUST(connect_to(s[3], "@away"));
}

static void unix_datagram_pair_bound_check(void)
{
	expect_from(s[1], "named", "@bound");
	expect_link(s[0], s[1]);
	put(s[3], "elsewhere");
	expect_text(s[2], "elsewhere");
	CHECK(option(s[4], SO_ERROR) == 0, "an error waits");
	CHECK(send(s[4], "x", 1, 0) == -1 && errno == EPERM, "it may send");
}

static void unix_datagram_pair_bound_spoil(void) { drain(s[1]); }
STATE(unix_datagram_pair_bound)

static void unix_datagram_disconnected_setup(void)
{
	sa_family_t family = AF_UNSPEC;
	s[0] = bound(SOCK_DGRAM, "@server");
	s[1] = connected(SOCK_DGRAM, "@server");
	MUST(connect(s[1], (struct sockaddr *)&family, sizeof family));
}

static void unix_datagram_disconnected_check(void)
{
	CHECK(send(s[1], "x", 1, 0) == -1 && errno == ENOTCONN, "it is connected");
	put_to(s[1], "x", "@server");
	expect_text(s[0], "x");
}

static void unix_datagram_disconnected_spoil(void) { MUST(connect_to(s[1], "@server")); }
STATE(unix_datagram_disconnected)

static void unix_datagram_full_setup(void)
{
	s[0] = bound(SOCK_DGRAM, "@full");
	s[1] = MUST(socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0));
	MUST(connect_to(s[1], "@full"));
	while (send(s[1], "0123456789", 10, 0) > 0)
		s[2]++;
}

static void unix_datagram_full_check(void)
{
	CHECK(send(s[1], "x", 1, 0) == -1 && errno == EAGAIN, "there is room");
	for (int i = 0; i < s[2]; i++)
		expect_text(s[0], "0123456789");
	expect_nothing(s[0]);
	put(s[1], "x");
}

static void unix_datagram_full_spoil(void) { drain(s[0]); }
STATE(unix_datagram_full)

static void unix_both_named_listener_closed_setup(void)
{
	s[0] = listening(SOCK_STREAM, "@server", 5);
	for (int i = 1; i < 5; i += 2) {
		s[i] = bound(SOCK_STREAM, i == 1 ? "@one" : "@two");
		MUST(connect_to(s[i], "@server"));
		s[i + 1] = MUST(accept(s[0], NULL, NULL));
	}
	close(s[0]);
}

static void unix_both_named_listener_closed_check(void)
{
	for (int i = 1; i < 5; i += 2) {
		expect_name(s[i], false, i == 1 ? "@one" : "@two");
		expect_name(s[i], true, "@server");
		expect_link(s[i], s[i + 1]);
	}
	s[0] = listening(SOCK_STREAM, "@server", 5);
}

static void unix_both_named_listener_closed_spoil(void) { s[0] = listening(SOCK_STREAM, "@server", 5); close(s[4]); }
STATE(unix_both_named_listener_closed)

static void unix_datagram_name_taken_since_setup(void)
{
	int old = bound(SOCK_DGRAM, "@taken");
	s[0] = connected(SOCK_DGRAM, "@taken");
	close(old);
	s[1] = bound(SOCK_DGRAM, "@taken");
}

static void unix_datagram_name_taken_since_check(void)
{
	CHECK(send(s[0], "x", 1, 0) == -1 && errno == ECONNREFUSED, "it reaches somebody");
	expect_nothing(s[1]);
	put_to(s[0], "y", "@taken");
	expect_text(s[1], "y");
}

static void unix_datagram_name_taken_since_spoil(void) { MUST(connect_to(s[0], "@taken")); }
STATE(unix_datagram_name_taken_since)

static void unix_client_name_taken_since_setup(void)
{
	s[0] = listening(SOCK_STREAM, "@server", 5);
	int old = bound(SOCK_STREAM, "@client");
	MUST(connect_to(old, "@server"));
	s[1] = MUST(accept(s[0], NULL, NULL));
	put(old, "old");
	close(old);
	s[2] = bound(SOCK_STREAM, "@client");
	MUST(connect_to(s[2], "@server"));
	s[3] = MUST(accept(s[0], NULL, NULL));
}

static void unix_client_name_taken_since_check(void)
{
	expect_text(s[1], "old");
	expect_end(s[1]);
	expect_name(s[2], false, "@client");
	expect_name(s[3], true, "@client");
	expect_link(s[2], s[3]);
}

static void unix_client_name_taken_since_spoil(void) { drain(s[1]); }
STATE(unix_client_name_taken_since)

/* Data come before the connection is accepted, as with any busy server: a save waits for that. */
static pthread_t busy;
static void *accept_late(void *unused)
{
	(void)unused;
	usleep(300000);
	s[2] = MUST(accept(s[0], NULL, NULL));
	return NULL;
}
static void unix_accepted_late_setup(void)
{
	s[0] = listening(SOCK_STREAM, "@busy", 5);
	s[1] = connected(SOCK_STREAM, "@busy");
	put(s[1], "early");
	CHECK(pthread_create(&busy, NULL, accept_late, NULL) == 0, "no thread");
}
static void unix_accepted_late_check(void)
{
	pthread_join(busy, NULL);
	expect_text(s[2], "early");
	expect_link(s[2], s[1]);
}
static void unix_accepted_late_spoil(void) { pthread_join(busy, NULL); pthread_create(&busy, NULL, accept_late, NULL); close(s[1]); s[1] = connected(SOCK_STREAM, "@busy"); }
STATE(unix_accepted_late)

/* What can't be saved. */

static void unix_waiting_with_data_setup(void) { s[0] = listening(SOCK_STREAM, "@waiting", 5); s[1] = connected(SOCK_STREAM, "@waiting"); put(s[1], "early"); }
static void unix_waiting_with_data_check(void) { int server = MUST(accept(s[0], NULL, NULL)); expect_text(server, "early"); expect_link(server, s[1]); }
static void unix_waiting_with_data_spoil(void) { close(s[1]); s[1] = -1; }
STATE(unix_waiting_with_data, .refused = "data in a unix connection that nobody has accepted")

static void unix_waiting_closed_setup(void) { s[0] = listening(SOCK_STREAM, "@waiting", 5); s[1] = connected(SOCK_STREAM, "@waiting"); put(s[1], "early"); close(s[1]); }
static void unix_waiting_closed_check(void) { int server = MUST(accept(s[0], NULL, NULL)); expect_text(server, "early"); expect_end(server); }
static void unix_waiting_closed_spoil(void) { MUST(accept(s[0], NULL, NULL)); s[1] = connected(SOCK_STREAM, "@waiting"); }
STATE(unix_waiting_closed, .refused = "data in a unix connection that nobody has accepted")

static void unix_hard_link_setup(void) { s[0] = listening(SOCK_STREAM, "/tmp/first", 5); MUST(link("/tmp/first", "/tmp/second")); }
static void unix_hard_link_check(void) { s[1] = connected(SOCK_STREAM, "/tmp/first"); s[2] = connected(SOCK_STREAM, "/tmp/second"); MUST(accept(s[0], NULL, NULL)); }
static void unix_hard_link_spoil(void) { MUST(unlink("/tmp/second")); bound(SOCK_STREAM, "/tmp/second"); s[1] = MUST(socket(AF_UNIX, SOCK_STREAM, 0)); CHECK(connect_to(s[1], "/tmp/second") == 0, "nobody is found"); }
STATE(unix_hard_link, .refused = "several names")

static void unix_datagram_error_setup(void)
{
	MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, s));
	s[2] = bound(SOCK_DGRAM, "@elsewhere");
	put(s[1], "lost");
	MUST(connect_to(s[0], "@elsewhere"));
}
static void unix_datagram_error_check(void) { CHECK(option(s[1], SO_ERROR) == ECONNRESET, "no error waits"); }
static void unix_datagram_error_spoil(void) { option(s[1], SO_ERROR); }
STATE(unix_datagram_error, .refused = "an error that waits")

static void unix_seqpacket_behind_error_setup(void) { MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, s)); put(s[1], "kept"); put(s[0], "never read"); close(s[1]); }
static void unix_seqpacket_behind_error_check(void) { CHECK(option(s[0], SO_ERROR) == ECONNRESET, "no error waits"); expect_text(s[0], "kept"); expect_end(s[0]); }
static void unix_seqpacket_behind_error_spoil(void) { option(s[0], SO_ERROR); }
STATE(unix_seqpacket_behind_error, .refused = "behind an error")
