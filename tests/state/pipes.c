/* Pipes and FIFOs. */
#include "state.h"

#include <sys/ioctl.h>
#include <sys/uio.h>

static int ends[2], more[2];
static char byte_of[1];

static int held(int fd)
{
	int bytes;
	MUST(ioctl(fd, FIONREAD, &bytes));
	return bytes;
}

static bool gives(int fd, size_t room, const char *text)
{
	char buffer[8192];
	ssize_t count = read(fd, buffer, room);
	return count == (ssize_t)strlen(text) && !memcmp(buffer, text, (size_t)count);
}

static void pipe_packets_setup(void)
{
	MUST(pipe2(ends, O_DIRECT | O_NONBLOCK));
	MUST(write(ends[1], "one", 3));
	MUST(write(ends[1], "twotwo", 6));
	MUST(write(ends[1], "3", 1));
}
static void pipe_packets_check(void)
{
	MUST(write(ends[1], "four", 4));
	CHECK(gives(ends[0], 100, "one"), "the first packet");
	CHECK(gives(ends[0], 3, "two"), "the second packet in part");
	CHECK(gives(ends[0], 100, "3"), "the third packet");
	CHECK(gives(ends[0], 100, "four"), "the packet written afterwards");
	CHECK(MUST(fcntl(ends[1], F_GETFL)) & O_DIRECT, "the mode is lost");
}
static void pipe_packets_spoil(void) { char byte; MUST(read(ends[0], &byte, 1)); }
STATE(pipe_packets)

static void pipe_one_packet_setup(void)
{
	MUST(pipe2(ends, O_DIRECT));
	MUST(write(ends[1], "single", 6));
	/* The mode belongs to new data. */
	MUST(fcntl(ends[1], F_SETFL, 0));
	MUST(pipe2(more, O_DIRECT));
	MUST(write(more[1], "x", 1));
}
static void pipe_one_packet_check(void)
{
	MUST(write(ends[1], "stream", 6));
	CHECK(gives(ends[0], 2, "si"), "a part of the packet");
	CHECK(gives(ends[0], 100, "stream"), "the stream behind it");
	CHECK(!(MUST(fcntl(ends[1], F_GETFL)) & O_DIRECT), "the mode is back");
	MUST(write(more[1], "y", 1));
	CHECK(gives(more[0], 100, "x") && gives(more[0], 100, "y"), "packets of one byte");
}
static void pipe_one_packet_spoil(void) { char byte; MUST(read(ends[0], &byte, 1)); }
STATE(pipe_one_packet)

static void pipe_full_packets_setup(void)
{
	char packet[4096];
	MUST(pipe2(ends, O_DIRECT | O_NONBLOCK));
	for (int i = 0; i < 16; i++) {
		memset(packet, 'a' + i, sizeof packet);
		CHECK(write(ends[1], packet, (size_t)(i == 5 ? 10 : 4096)) > 0, "write");
	}
}
static void pipe_full_packets_check(void)
{
	char packet[5000];
	CHECK(write(ends[1], "x", 1) == -1 && errno == EAGAIN, "the pipe is not full");
	for (int i = 0; i < 16; i++)
		CHECK(read(ends[0], packet, sizeof packet) == (i == 5 ? 10 : 4096) && packet[0] == 'a' + i, "packet %d", i);
}
static void pipe_full_packets_spoil(void) { char byte; MUST(read(ends[0], &byte, 1)); }
STATE(pipe_full_packets)

static char *gifted = "from memory of the program, by reference";
static void pipe_vmsplice_setup(void)
{
	MUST(pipe(ends));
	MUST(fcntl(ends[1], F_SETPIPE_SZ, 1 << 20));
	struct iovec vector = {.iov_base = gifted, .iov_len = strlen(gifted)};
	MUST(vmsplice(ends[1], &vector, 1, 0));
	int file = MUST(open("/etc/passwd", O_RDONLY));
	MUST(splice(file, NULL, ends[1], NULL, 10, 0));
	MUST(write(ends[1], "end", 3));
}
static void pipe_vmsplice_check(void)
{
	char text[256] = "";
	size_t length = strlen(gifted);
	CHECK(fcntl(ends[0], F_GETPIPE_SZ) == 1 << 20, "the capacity is %d", fcntl(ends[0], F_GETPIPE_SZ));
	CHECK(read(ends[0], text, sizeof text) == (ssize_t)length + 13, "%s", text);
	CHECK(!memcmp(text, gifted, length) && !memcmp(text + length, "root:x:0:0end", 13), "the content is %s", text);
}
static void pipe_vmsplice_spoil(void) { MUST(write(ends[1], "more", 4)); }
STATE(pipe_vmsplice)

static void pipe_half_setup(void)
{
	MUST(pipe(ends));
	MUST(write(ends[1], "last words", 10));
	close(ends[1]);
	MUST(pipe(more));
	close(more[0]);
	signal(SIGPIPE, SIG_IGN);
}
static void pipe_half_check(void)
{
	CHECK(gives(ends[0], 100, "last words") && gives(ends[0], 100, ""), "the reading end");
	CHECK(write(more[1], "x", 1) == -1 && errno == EPIPE, "the writing end");
}
static void pipe_half_spoil(void) { char byte; MUST(read(ends[0], &byte, 1)); }
STATE(pipe_half)

static void pipe_reopened_setup(void)
{
	char path[32];
	MUST(pipe2(ends, O_NONBLOCK));
	snprintf(path, sizeof path, "/proc/self/fd/%d", ends[0]);
	more[0] = MUST(open(path, O_RDWR));
	more[1] = MUST(open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC));
	close(ends[1]);
	MUST(write(more[1], "ab", 2));
}
static void pipe_reopened_check(void)
{
	CHECK((MUST(fcntl(more[0], F_GETFL)) & (O_ACCMODE | O_NONBLOCK)) == O_RDWR, "flags of the first");
	CHECK((MUST(fcntl(more[1], F_GETFL)) & (O_ACCMODE | O_NONBLOCK)) == (O_WRONLY | O_NONBLOCK), "flags of the second");
	MUST(write(more[0], "c", 1));
	CHECK(gives(ends[0], 100, "abc"), "the content");
	CHECK(read(ends[0], byte_of, 1) == -1 && errno == EAGAIN, "the end of the pipe was seen");
}
static void pipe_reopened_spoil(void) { MUST(write(more[1], "x", 1)); }
STATE(pipe_reopened)

static void fifo_one_end_setup(void)
{
	MUST(mkfifo("/tmp/one-end", 0600));
	ends[0] = MUST(open("/tmp/one-end", O_RDONLY | O_NONBLOCK));
	MUST(mkfifo("/dev/shm/both", 0622));
	more[0] = MUST(open("/dev/shm/both", O_RDWR));
	MUST(write(more[0], "kept", 4));
}
static void fifo_one_end_check(void)
{
	CHECK(read(ends[0], byte_of, 1) == 0, "somebody writes");
	int writer = MUST(open("/tmp/one-end", O_WRONLY | O_NONBLOCK));
	MUST(write(writer, "x", 1));
	CHECK(gives(ends[0], 10, "x"), "the FIFO is another");
	CHECK(held(more[0]) == 4, "it holds %d bytes", held(more[0]));
	int again = MUST(open("/dev/shm/both", O_RDONLY));
	CHECK(gives(again, 10, "kept"), "the FIFO of the tmpfs");
}
static void fifo_one_end_spoil(void) { MUST(write(more[0], "x", 1)); }
STATE(fifo_one_end)
