/*
 * Data on its way: pipes, FIFOs and socket pairs whose queues hold something, event counters, a full pipe with a blocked
 * writer, a stream of numbers from one process to another, and descriptors that share an offset. Each round sets such a
 * state up, keeps it for a second, and then looks whether every byte, boundary, counter, offset and flag is still there.
 */
#include "workload.h"
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define QUEUED 40000

static void pattern(uint8_t *to, size_t length, uint64_t seed)
{
	for (size_t i = 0; i < length; i++)
		to[i] = (uint8_t)mix(seed + i / 8) ^ (uint8_t)i;
}

static void reads(const char *what, int fd, size_t length, uint64_t seed)
{
	static uint8_t expected[1 << 20], got[1 << 20];
	pattern(expected, length, seed);
	if (breaking(what))
		expected[length / 2] ^= 1;
	for (size_t have = 0; have < length;) {
		ssize_t r = read(fd, got + have, length - have);
		CHECK(r > 0, "%s: %zu of %zu bytes were still queued", what, have, length);
		have += (size_t)r;
	}
	for (size_t i = 0; i < length; i++)
		CHECK(got[i] == expected[i], "%s: byte %zu of %zu", what, i, length);
}

static void is_empty(const char *what, int fd)
{
	/* An eventfd takes no less. */
	char bytes[8];
	int flags = MUST(fcntl(fd, F_GETFL));
	MUST(fcntl(fd, F_SETFL, flags | O_NONBLOCK));
	CHECK(read(fd, bytes, sizeof bytes) == -1 && errno == EAGAIN, "%s: more is queued than was written, or the other end is gone", what);
	MUST(fcntl(fd, F_SETFL, flags));
}

static void fills(int fd, size_t length, uint64_t seed)
{
	static uint8_t data[1 << 20];
	pattern(data, length, seed);
	CHECK(write(fd, data, length) == (ssize_t)length, "set-up failed: write");
}

static int queue[2], wide[2], ended[2], packets[2], fifo, semaphore, counter, stream[2], datagram[2], sequenced[2];
static int shared, duplicate, separate, appending;
static pid_t sharer, blocked, producer;
static int to_sharer[2], full[2], flow[2];
static char fifo_path[64], file_path[64], deleted_path[64];
static int deleted;

static void set_up(uint64_t round)
{
	MUST(pipe2(queue, O_CLOEXEC));
	fills(queue[1], QUEUED, round);

	MUST(pipe2(wide, O_CLOEXEC | O_NONBLOCK));
	CHECK(fcntl(wide[0], F_SETPIPE_SZ, 1 << 20) == 1 << 20, "set-up failed: F_SETPIPE_SZ");
	fills(wide[1], 700000, round + 1);

	/* Its writer is gone: what is queued comes, then the end. */
	MUST(pipe(ended));
	fills(ended[1], 1000, round + 2);
	close(ended[1]);

	/* In packet mode one read brings one write. */
	if (takes_part("packets")) {
		MUST(pipe2(packets, O_CLOEXEC | O_DIRECT));
		fills(packets[1], 100, round + 3);
		fills(packets[1], 200, round + 4);
	}

	snprintf(fifo_path, sizeof fifo_path, "/tmp/pipes-%d.fifo", getpid());
	MUST(mkfifo(fifo_path, 0600));
	fifo = MUST(open(fifo_path, O_RDWR | O_CLOEXEC));
	fills(fifo, 5000, round + 5);

	semaphore = MUST(eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC));
	counter = MUST(eventfd((unsigned)round + 9, EFD_NONBLOCK | EFD_CLOEXEC));

	MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, stream));
	fills(stream[0], 30000, round + 6);
	fills(stream[1], 20000, round + 7);
	MUST(shutdown(stream[0], SHUT_WR));
	MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, datagram));
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sequenced));
	for (uint64_t i = 0; i < 3; i++) {
		fills(datagram[0], 10 + i, round + 10 + i);
		fills(sequenced[0], 1000 + i, round + 20 + i);
	}

	snprintf(file_path, sizeof file_path, "/tmp/pipes-%d.file", getpid());
	shared = MUST(open(file_path, O_RDWR | O_CREAT | O_TRUNC, 0600));
	fills(shared, 10000, round + 30);
	duplicate = MUST(fcntl(shared, F_DUPFD, 200));
	separate = MUST(open(file_path, O_RDONLY | O_CLOEXEC));
	appending = MUST(open(file_path, O_WRONLY | O_APPEND));
	MUST(lseek(shared, 1234, SEEK_SET));
	MUST(lseek(separate, 99, SEEK_SET));

	if (takes_part("deleted")) {
		snprintf(deleted_path, sizeof deleted_path, "/tmp/pipes-%d.deleted", getpid());
		deleted = MUST(open(deleted_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
		fills(deleted, 50000, round + 40);
		MUST(unlink(deleted_path));
		MUST(lseek(deleted, 0, SEEK_SET));
	}

	/* A child that moves the shared offset when it is told to. */
	MUST(pipe(to_sharer));
	sharer = MUST(fork());
	if (sharer == 0) {
		char byte;
		close(to_sharer[1]);
		if (read(to_sharer[0], &byte, 1) != 1)
			_exit(9);
		_exit(lseek(duplicate, 111, SEEK_CUR) == 1345 ? 0 : 8);
	}

	/* A writer that waits for room. */
	MUST(pipe(full));
	blocked = MUST(fork());
	if (blocked == 0) {
		close(full[0]);
		/* A stop ends a write early that has written something, under any kernel: the rest is written by another call. */
		static uint8_t data[200000];
		pattern(data, sizeof data, round + 50);
		for (size_t done = 0; done < sizeof data;)
			done += (size_t)MUST(write(full[1], data + done, sizeof data - done));
		_exit(0);
	}
	close(full[1]);

	/* Numbers that flow all the time. */
	MUST(pipe(flow));
	producer = MUST(fork());
	if (producer == 0) {
		close(flow[0]);
		for (uint64_t n = 0; n < 2000000; n++)
			if (write(flow[1], &n, 8) != 8)
				_exit(1);
		_exit(0);
	}
	close(flow[1]);
}

static void flows(int64_t until_ns)
{
	uint64_t expected = 0, some[64];
	size_t have = 0;
	while (expected < 2000000) {
		ssize_t r = read(flow[0], (char *)some + have, sizeof some - have);
		CHECK(r > 0, "the flow ended at %llu", (unsigned long long)expected);
		have += (size_t)r;
		for (size_t i = 0; i < have / 8; i++, expected++)
			CHECK(some[i] == expected + (breaking("flow") && expected == 1000), "%llu flowed where %llu was due",
			      (unsigned long long)some[i], (unsigned long long)expected);
		memmove(some, (char *)some + have / 8 * 8, have % 8);
		have %= 8;
		if (expected % 40000 < 64 && now_ns() < until_ns)
			doze(20 * MS);
	}
	doze(until_ns - now_ns());
}

static void ends_with(const char *what, pid_t child)
{
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0, "%s ended with %#x", what, status);
}

static void verify(uint64_t round)
{
	reads("queue", queue[0], QUEUED, round);
	is_empty("queue", queue[0]);
	CHECK((fcntl(queue[0], F_GETFD) & FD_CLOEXEC) && !(fcntl(ended[0], F_GETFD) & FD_CLOEXEC), "close-on-exec flags of the pipes");

	CHECK(fcntl(wide[0], F_GETPIPE_SZ) == (breaking("capacity") ? 65536 : 1 << 20), "a pipe widened to 1 MiB takes %d", fcntl(wide[0], F_GETPIPE_SZ));
	CHECK(fcntl(wide[1], F_GETFL) & O_NONBLOCK, "the wide pipe blocks");
	reads("wide", wide[0], 700000, round + 1);
	reads("ended", ended[0], 1000, round + 2);
	char buffer[4096];
	CHECK(read(ended[0], buffer, 1) == 0, "a pipe without a writer does not end");
	if (takes_part("packets")) {
		CHECK(read(packets[0], buffer, sizeof buffer) == 100, "the first packet is not 100 bytes");
		CHECK(read(packets[0], buffer, sizeof buffer) == (breaking("packets") ? 100 : 200), "the second packet is not 200 bytes");
	}
	reads("fifo", fifo, 5000, round + 5);
	is_empty("fifo", fifo);
	int again = MUST(open(fifo_path, O_WRONLY | O_NONBLOCK));
	fills(again, 10, round);
	reads("fifo by its name", fifo, 10, round);

	uint64_t value;
	for (int i = 0; i < 3; i++)
		CHECK(read(semaphore, &value, 8) == 8 && value == 1, "event semaphore");
	is_empty("event semaphore", semaphore);
	CHECK(read(counter, &value, 8) == 8 && value == round + (breaking("eventfd") ? 8 : 9), "an eventfd holds %llu", (unsigned long long)value);

	reads("stream", stream[1], 30000, round + 6);
	CHECK(read(stream[1], buffer, 1) == 0, "a stream that was shut down does not end");
	reads("stream back", stream[0], 20000, round + 7);
	is_empty("stream back", stream[0]);
	for (uint64_t i = 0; i < 3; i++) {
		uint8_t expected[2000];
		ssize_t r = read(datagram[1], buffer, sizeof buffer);
		pattern(expected, 10 + i, round + 10 + i);
		CHECK(r == (ssize_t)(10 + i) && !memcmp(buffer, expected, 10 + i) && !breaking("datagram"), "datagram %d: %zd bytes", (int)i, r);
		r = read(sequenced[1], buffer, sizeof buffer);
		pattern(expected, 1000 + i, round + 20 + i);
		CHECK(r == (ssize_t)(1000 + i) && !memcmp(buffer, expected, 1000 + i) && !breaking("seqpacket"), "packet %d: %zd bytes", (int)i, r);
	}
	is_empty("datagram", datagram[1]);
	is_empty("seqpacket", sequenced[1]);

	CHECK(lseek(shared, 0, SEEK_CUR) == 1234 && lseek(duplicate, 0, SEEK_CUR) == 1234 && lseek(separate, 0, SEEK_CUR) == (breaking("offset") ? 98 : 99), "offsets");
	MUST(write(to_sharer[1], "x", 1));
	ends_with("the sharer of an offset", sharer);
	CHECK(lseek(shared, 0, SEEK_CUR) == 1345, "a child's lseek is not seen: the offset is no longer shared");
	MUST(write(appending, "end", 3));
	CHECK(lseek(separate, 0, SEEK_END) == 10003, "O_APPEND wrote elsewhere");
	if (takes_part("deleted")) {
		struct stat status;
		reads("deleted", deleted, 50000, round + 40);
		CHECK(fstat(deleted, &status) == 0 && status.st_nlink == 0, "a deleted file has a name");
		CHECK(access(deleted_path, F_OK) == -1, "a deleted file is there again");
	}
	reads("full", full[0], 200000, round + 50);
	ends_with("the writer to a full pipe", blocked);
	ends_with("the producer", producer);
	unlink(fifo_path);
	unlink(file_path);
	int all[] = {queue[0], queue[1], wide[0], wide[1], ended[0], fifo, again, semaphore, counter, stream[0], stream[1],
		datagram[0], datagram[1], sequenced[0], sequenced[1], shared, duplicate, separate, appending,
		to_sharer[0], to_sharer[1], full[0], flow[0]};
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		CHECK(close(all[i]) == 0, "descriptor %d was not open", all[i]);
	if (takes_part("packets")) { close(packets[0]); close(packets[1]); }
	if (takes_part("deleted")) close(deleted);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	uint64_t round = 0;
	set_up(round);
	ready();
	do {
		flows(now_ns() + SECOND);
		verify(round);
		set_up(++round);
	} while (goes_on());
	flows(now_ns());
	verify(round);
	return finished("rounds=%llu", (unsigned long long)round);
}
