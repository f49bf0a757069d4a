/* POSIX message queues. */
#include "state.h"

#include <mqueue.h>
#include <poll.h>

static mqd_t queue_of(const char *name, int flags, long messages, long bytes)
{
	struct mq_attr attributes = {.mq_maxmsg = messages, .mq_msgsize = bytes};
	return MUST(mq_open(name, flags | O_CREAT | O_EXCL, 0600, &attributes));
}

static void expect_message(mqd_t queue, unsigned wanted, const char *text)
{
	char got[8192];
	unsigned priority;
	struct timespec now = {0};
	ssize_t bytes = mq_timedreceive(queue, got, sizeof got, &priority, &now);
	CHECK(bytes == (ssize_t)strlen(text) && !memcmp(got, text, strlen(text)) && priority == wanted,
		"%zd bytes of priority %u, not %s", bytes, priority, text);
}

static mqd_t order_queue;

static void mqueue_order_setup(void)
{
	order_queue = queue_of("/order", O_RDWR, 9, 64);
	const char *texts[] = {"low", "high", "low again", "", "middle", "high again", "lowest", "highest"};
	unsigned priorities[] = {1, 9, 1, 1, 5, 9, 0, 32767};
	for (int index = 0; index < 8; index++)
		MUST(mq_send(order_queue, texts[index], strlen(texts[index]), priorities[index]));
}

static void mqueue_order_check(void)
{
	struct mq_attr attributes;
	MUST(mq_getattr(order_queue, &attributes));
	CHECK(attributes.mq_maxmsg == 9 && attributes.mq_msgsize == 64 && attributes.mq_curmsgs == 8 && attributes.mq_flags == 0,
		"%ld messages of %ld bytes, has %ld, flags %lx", attributes.mq_maxmsg, attributes.mq_msgsize, attributes.mq_curmsgs, attributes.mq_flags);
	expect_message(order_queue, 32767, "highest");
	expect_message(order_queue, 9, "high");
	expect_message(order_queue, 9, "high again");
	expect_message(order_queue, 5, "middle");
	expect_message(order_queue, 1, "low");
	expect_message(order_queue, 1, "low again");
	expect_message(order_queue, 1, "");
	expect_message(order_queue, 0, "lowest");
}

static void mqueue_order_spoil(void) { expect_message(order_queue, 32767, "highest"); }

STATE(mqueue_order)

static void mqueue_closed_setup(void)
{
	mqd_t queue = queue_of("/closed", O_WRONLY, 3, 100);
	MUST(mq_send(queue, "kept", 4, 2));
	MUST(mq_close(queue));
	MUST(chmod("/dev/mqueue/closed", 0646));
	MUST(chown("/dev/mqueue/closed", 1000, 100));
}

static void mqueue_closed_check(void)
{
	struct stat status;
	MUST(stat("/dev/mqueue/closed", &status));
	CHECK((status.st_mode & 07777) == 0646 && status.st_uid == 1000 && status.st_gid == 100, "mode %o of %u", status.st_mode, status.st_uid);
	mqd_t queue = mq_open("/closed", O_RDONLY);
	CHECK(queue >= 0, "there is no such queue");
	expect_message(queue, 2, "kept");
}

static void mqueue_closed_spoil(void) { MUST(chmod("/dev/mqueue/closed", 0644)); }

STATE(mqueue_closed)

static mqd_t unlinked_queues[3];

static void mqueue_unlinked_setup(void)
{
	for (int index = 0; index < 3; index++) {
		unlinked_queues[index] = queue_of("/same", O_RDWR, 4, 32);
		char text = (char)('a' + index);
		MUST(mq_send(unlinked_queues[index], &text, 1, (unsigned)index));
		if (index < 2)
			MUST(mq_unlink("/same"));
	}
}

static void mqueue_unlinked_check(void)
{
	CHECK(access("/dev/mqueue/same", F_OK) == 0, "the name is gone");
	expect_message(unlinked_queues[0], 0, "a");
	expect_message(unlinked_queues[1], 1, "b");
	mqd_t named = MUST(mq_open("/same", O_RDWR));
	expect_message(named, 2, "c");
	MUST(mq_send(unlinked_queues[2], "d", 1, 3));
	expect_message(named, 3, "d");
	MUST(mq_unlink("/same"));
}

static void mqueue_unlinked_spoil(void) { expect_message(unlinked_queues[1], 1, "b"); }

STATE(mqueue_unlinked)

static mqd_t flags_queues[3];

static void mqueue_flags_setup(void)
{
	flags_queues[0] = queue_of("/flags", O_RDWR | O_NONBLOCK, 2, 16);
	flags_queues[1] = MUST(mq_open("/flags", O_RDONLY));
	flags_queues[2] = MUST(mq_open("/flags", O_WRONLY));
	MUST(mq_send(flags_queues[2], "1", 1, 0));
	MUST(mq_send(flags_queues[2], "2", 1, 0));
}

static void mqueue_flags_check(void)
{
	CHECK(mq_send(flags_queues[0], "3", 1, 0) == -1 && errno == EAGAIN, "a full queue takes one more");
	CHECK(mq_send(flags_queues[1], "3", 1, 0) == -1 && errno == EBADF, "a descriptor for reading can send");
	char text[16];
	CHECK(mq_receive(flags_queues[2], text, 16, NULL) == -1 && errno == EBADF, "a descriptor for writing can receive");
	struct mq_attr attributes;
	MUST(mq_getattr(flags_queues[1], &attributes));
	CHECK(attributes.mq_flags == 0, "one has become non-blocking");
	expect_message(flags_queues[1], 0, "1");
	expect_message(flags_queues[1], 0, "2");
	CHECK(mq_receive(flags_queues[0], text, 16, NULL) == -1 && errno == EAGAIN, "an empty queue blocks, or has one more");
}

static void mqueue_flags_spoil(void)
{
	struct mq_attr attributes = {.mq_flags = O_NONBLOCK};
	MUST(mq_setattr(flags_queues[1], &attributes, NULL));
}

STATE(mqueue_flags)

static mqd_t blocked_queues[2];
static pid_t blocked_children[2];

static int receiver_body(void)
{
	char text[16];
	unsigned priority;
	struct timespec limit;
	MUST(clock_gettime(CLOCK_REALTIME, &limit));
	limit.tv_sec += 300;
	return mq_timedreceive(blocked_queues[0], text, 16, &priority, &limit) == 5 && priority == 4 && !memcmp(text, "hello", 5) ? 0 : 1;
}

static int sender_body(void) { return mq_send(blocked_queues[1], "second", 6, 1) == 0 ? 0 : 1; }

static void mqueue_blocked_setup(void)
{
	blocked_queues[0] = queue_of("/blocked-0", O_RDWR, 1, 16);
	blocked_queues[1] = queue_of("/blocked-1", O_RDWR, 1, 16);
	MUST(mq_send(blocked_queues[1], "first", 5, 0));
	blocked_children[0] = in_child(receiver_body);
	blocked_children[1] = in_child(sender_body);
	usleep(50000);
}

static void mqueue_blocked_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a blocked process has ended");
	MUST(mq_send(blocked_queues[0], "hello", 5, 4));
	expect_exit(blocked_children[0], 0);
	expect_message(blocked_queues[1], 0, "first");
	expect_exit(blocked_children[1], 0);
	expect_message(blocked_queues[1], 1, "second");
}

static void mqueue_blocked_spoil(void) { MUST(mq_send(blocked_queues[0], "other", 5, 4)); }

STATE(mqueue_blocked)

static mqd_t reserved_queue;

static void mqueue_reserved_setup(void)
{
	reserved_queue = queue_of("/reserved", O_RDWR, 3, 16);
	struct sigevent event = {.sigev_notify = SIGEV_NONE};
	MUST(mq_notify(reserved_queue, &event));
}

static void mqueue_reserved_check(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_NONE};
	CHECK(mq_notify(reserved_queue, &event) == -1 && errno == EBUSY, "nobody waits for a message");
	MUST(mq_notify(reserved_queue, NULL));
	MUST(mq_notify(reserved_queue, &event));
}

static void mqueue_reserved_spoil(void) { MUST(mq_notify(reserved_queue, NULL)); }

STATE(mqueue_reserved)

static mqd_t notified_queue;
static volatile sig_atomic_t notified;

static void on_notification(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)context;
	notified = info->si_value.sival_int;
}

static void mqueue_notified_setup(void)
{
	notified_queue = queue_of("/notified", O_RDWR, 3, 16);
	struct sigaction action = {.sa_sigaction = on_notification, .sa_flags = SA_SIGINFO};
	MUST(sigaction(SIGUSR1, &action, NULL));
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1, .sigev_value.sival_int = 77};
	MUST(mq_notify(notified_queue, &event));
}

static void mqueue_notified_check(void)
{
	MUST(mq_send(notified_queue, "x", 1, 0));
	CHECK(notified == 77, "nobody was told of a message");
}

static void mqueue_notified_spoil(void) { MUST(mq_notify(notified_queue, NULL)); }

STATE(mqueue_notified, .refused = "mq_notify")

static mqd_t polled_queue;

static void mqueue_full_setup(void)
{
	polled_queue = queue_of("/full", O_RDWR | O_NONBLOCK, 10, 8192);
	char text[8192];
	for (int index = 0; index < 10; index++) {
		memset(text, 'a' + index, sizeof text);
		MUST(mq_send(polled_queue, text, sizeof text, (unsigned)(index % 3)));
	}
}

static void mqueue_full_check(void)
{
	struct pollfd poll_for = {.fd = polled_queue, .events = POLLIN | POLLOUT};
	CHECK(poll(&poll_for, 1, 0) == 1 && poll_for.revents == POLLIN, "events %x", poll_for.revents);
	char text[8192];
	const char order[] = "cfibehadgj";
	for (int index = 0; index < 10; index++) {
		CHECK(mq_receive(polled_queue, text, sizeof text, NULL) == 8192, "message %d is missing", index);
		CHECK(text[0] == order[index] && text[8191] == order[index], "message %d is %c", index, text[0]);
	}
}

static void mqueue_full_spoil(void)
{
	char text[8192];
	MUST(mq_receive(polled_queue, text, sizeof text, NULL));
	MUST(mq_send(polled_queue, text, sizeof text, 0));
}

STATE(mqueue_full)
