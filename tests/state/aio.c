/* Contexts of asynchronous I/O (io_setup): their rings, and events that nobody has read. */
#include "state.h"

#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>

/* `struct aio_ring` of the kernel's fs/aio.c: a program may read events without a call. */
struct ring {
	unsigned id, events, head, tail, magic, compatible, incompatible, header_bytes;
	struct io_event event[];
};

static aio_context_t make_context(unsigned requests)
{
	aio_context_t context = 0;
	MUST(syscall(SYS_io_setup, requests, &context));
	return context;
}

static int counter;

/* A request that is complete as soon as it is submitted. */
static void submit(aio_context_t context, long data)
{
	if (!counter)
		counter = MUST(eventfd(0, EFD_NONBLOCK));
	struct iocb request = {.aio_data = data, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = counter, .aio_buf = POLLOUT};
	struct iocb *list[] = {&request};
	CHECK(syscall(SYS_io_submit, context, 1, list) == 1, "request %ld can't be submitted: %m", data);
}

/* The data of the next event; -1 where there is none. */
static long next(aio_context_t context)
{
	struct io_event event;
	struct timespec none = {0};
	long count = syscall(SYS_io_getevents, context, 0, 1, &event, &none);
	CHECK(count >= 0, "the context is gone: %m");
	return count ? (long)event.data : -1;
}

/* --- a context that has never been used, and others beside it --- */

static aio_context_t fresh[3];
static unsigned fresh_events[3];

static void aio_fresh_setup(void)
{
	for (int i = 0; i < 3; i++) {
		fresh[i] = make_context(1 << 4 * i);
		fresh_events[i] = ((struct ring *)fresh[i])->events;
	}
}

static void aio_fresh_check(void)
{
	for (int i = 0; i < 3; i++) {
		struct ring *ring = (struct ring *)fresh[i];
		CHECK(ring->events == fresh_events[i], "context %d has %u events, had %u", i, ring->events, fresh_events[i]);
		CHECK(ring->head == ring->tail && next(fresh[i]) == -1, "context %d has an event", i);
		submit(fresh[i], 7);
		CHECK(next(fresh[i]) == 7 && next(fresh[i]) == -1, "context %d gives other events", i);
	}
}

static void aio_fresh_spoil(void)
{
	submit(fresh[1], 1);
}
STATE(aio_fresh)

/* --- events that nobody has read, around the end of the ring --- */

static aio_context_t unread;
static struct ring unread_ring;

static void aio_unread_setup(void)
{
	unread = make_context(64);
	struct ring *ring = (struct ring *)unread;
	for (unsigned i = 0; i < 2 * ring->events - 20; i++) {
		submit(unread, i);
		CHECK(next(unread) == (long)i, "other events at once");
	}
	for (int i = 0; i < 50; i++)
		submit(unread, 1000 + i);
	unread_ring = *ring;
}

static void aio_unread_check(void)
{
	struct ring *ring = (struct ring *)unread;
	CHECK(ring->events == unread_ring.events, "%u events, had %u", ring->events, unread_ring.events);
	CHECK(ring->head == unread_ring.head, "head %u, was %u", ring->head, unread_ring.head);
	CHECK(ring->tail == unread_ring.tail, "tail %u, was %u", ring->tail, unread_ring.tail);
	CHECK(ring->event[ring->head].data == 1000, "the ring holds something else");
	submit(unread, 2000);
	for (int i = 0; i < 50; i++)
		CHECK(next(unread) == 1000 + i, "event %d is another", i);
	CHECK(next(unread) == 2000 && next(unread) == -1, "more events than there were");
}

static void aio_unread_spoil(void)
{
	next(unread);
}
STATE(aio_unread)

/* --- a ring without room for another request, and one that takes all that go in --- */

static aio_context_t full;
static long full_count;

static long fill(aio_context_t context)
{
	struct iocb request = {.aio_data = 5, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = counter, .aio_buf = POLLOUT};
	struct iocb *list[] = {&request};
	long count = 0;
	cpu_set_t before, one;
	MUST(sched_getaffinity(0, sizeof before, &before));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (!CPU_ISSET(cpu, &before) || sched_setaffinity(0, sizeof one, &one))
			continue;
		while (syscall(SYS_io_submit, context, 1, list) == 1)
			count++;
	}
	MUST(sched_setaffinity(0, sizeof before, &before));
	return count;
}

static void aio_full_setup(void)
{
	counter = MUST(eventfd(0, EFD_NONBLOCK));
	full = make_context(300);
	full_count = fill(full);
}

static void aio_full_check(void)
{
	CHECK(fill(full) == 0, "there is room");
	for (long i = 0; i < full_count; i++)
		CHECK(next(full) == 5, "event %ld of %ld is another", i, full_count);
	CHECK(next(full) == -1, "more events than there were");
	long again = fill(full);
	CHECK(again == full_count, "it takes %ld, took %ld", again, full_count);
}

static void aio_full_spoil(void)
{
	next(full);
}
STATE(aio_full)

/* --- a thread that waits for an event --- */

static aio_context_t awaited;
static pthread_t waiter;
static long got;

static void *wait_for_event(void *unused)
{
	(void)unused;
	struct io_event event;
	got = syscall(SYS_io_getevents, awaited, 1, 1, &event, NULL) == 1 ? (long)event.data : -errno;
	return NULL;
}

static void aio_awaited_setup(void)
{
	awaited = make_context(8);
	CHECK(!pthread_create(&waiter, NULL, wait_for_event, NULL), "no thread");
	usleep(100000);
}

static void aio_awaited_check(void)
{
	submit(awaited, 33);
	pthread_join(waiter, NULL);
	CHECK(got == 33, "it got %ld", got);
}

static void aio_awaited_spoil(void)
{
	submit(awaited, 34);
}
STATE(aio_awaited)

/* --- a request that is under way --- */

static aio_context_t busy;
static int busy_counter;

static void aio_busy_setup(void)
{
	busy = make_context(16);
	for (int i = 0; i < 3; i++)
		submit(busy, i);
	busy_counter = MUST(eventfd(0, EFD_NONBLOCK));
	static struct iocb request;
	request = (struct iocb){.aio_data = 77, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = busy_counter, .aio_buf = POLLIN};
	struct iocb *list[] = {&request};
	CHECK(syscall(SYS_io_submit, busy, 1, list) == 1, "no request");
}

static void aio_busy_check(void)
{
	for (int i = 0; i < 3; i++)
		CHECK(next(busy) == i, "event %d is another", i);
	CHECK(next(busy) == -1, "an event too many");
	uint64_t one = 1;
	MUST(write(busy_counter, &one, sizeof one));
	struct io_event event;
	CHECK(syscall(SYS_io_getevents, busy, 1, 1, &event, NULL) == 1 && event.data == 77, "its event is another");
}

static void aio_busy_spoil(void)
{
	submit(busy, 3);
}
STATE(aio_busy, .refused = "asynchronous requests (io_submit) that are under way are not supported")

/* --- a child that has its parent's ring and not the context --- */

static aio_context_t inherited;
static pid_t inheritor;

static int keep_ring(void)
{
	uint32_t before[8], *header = (uint32_t *)inherited;
	memcpy(before, header, sizeof before);
	until_finishing();
	if (memcmp(before, header, sizeof before))
		return 2;
	struct io_event event;
	return syscall(SYS_io_getevents, inherited, 0, 1, &event, NULL) == -1 && errno == EINVAL ? 0 : 1;
}

static void aio_inherited_setup(void)
{
	inherited = make_context(8);
	inheritor = in_child(keep_ring);
}

static void aio_inherited_check(void)
{
	expect_exit(inheritor, 0);
	CHECK(next(inherited) == -1, "an event");
}

static void aio_inherited_spoil(void)
{
	submit(inherited, 1);
}
STATE(aio_inherited)

/* --- the same, after its parent has ended --- */

static aio_context_t left_over;
static int orphan_pipe[2];

static bool ring_is_gone(void)
{
	int ends[2];
	MUST(pipe(ends));
	bool gone = write(ends[1], (void *)left_over, 1) == -1 && errno == EFAULT;
	close(ends[0]);
	close(ends[1]);
	return gone;
}

static int keep_ended_ring(void)
{
	/* The kernel takes it away a little after its owner has ended. */
	while (!ring_is_gone())
		usleep(1000);
	pid_t self = getpid();
	MUST(write(orphan_pipe[1], &self, sizeof self));
	until_finishing();
	return ring_is_gone() ? 0 : 1;
}

/* Has a context, a child that gets the ring, and an end. */
static int leave_ring(void)
{
	left_over = make_context(8);
	in_child(keep_ended_ring);
	return 0;
}

static pid_t orphaned;
static void aio_left_over_setup(void)
{
	MUST(pipe(orphan_pipe));
	expect_exit(in_child(leave_ring), 0);
	MUST(read(orphan_pipe[0], &orphaned, sizeof orphaned));
}
static void aio_left_over_check(void) { expect_exit(orphaned, 0); }
/* It is gone when the check asks for its end. */
static void aio_left_over_spoil(void) { MUST(waitpid(orphaned, NULL, 0)); }
STATE(aio_left_over)
