/* Open files: positions, flags, sharing. */
#include "state.h"

static int shared_offset_fds[2];
static pid_t shared_offset_child;
static int shared_offset_pipe[2];

static int shared_offset_body(void)
{
	char byte;
	/* The parent says when; a read of its moves the position for both. */
	if (read(shared_offset_pipe[0], &byte, 1) != 1)
		return 2;
	return lseek(shared_offset_fds[0], 0, SEEK_CUR) == 7 ? 0 : 1;
}

static void shared_offset_setup(void)
{
	shared_offset_fds[0] = MUST(open("/tmp/shared-offset", O_RDWR | O_CREAT | O_APPEND, 0600));
	MUST(write(shared_offset_fds[0], "0123456789", 10));
	shared_offset_fds[1] = MUST(dup(shared_offset_fds[0]));
	MUST(lseek(shared_offset_fds[0], 4, SEEK_SET));
	MUST(pipe(shared_offset_pipe));
	shared_offset_child = in_child(shared_offset_body);
}

static void shared_offset_check(void)
{
	char text[3];
	CHECK(read(shared_offset_fds[1], text, 3) == 3 && !memcmp(text, "456", 3), "the position is another");
	CHECK((MUST(fcntl(shared_offset_fds[0], F_GETFL)) & (O_APPEND | O_ACCMODE)) == (O_APPEND | O_RDWR), "the flags are others");
	MUST(write(shared_offset_pipe[1], "x", 1));
	expect_exit(shared_offset_child, 0);
}

static void shared_offset_spoil(void) { MUST(lseek(shared_offset_fds[0], 1, SEEK_SET)); }

STATE(shared_offset)
