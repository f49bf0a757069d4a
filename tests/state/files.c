/* Open files: positions, flags, sharing. */
#include "state.h"

#include <sys/sysmacros.h>

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

/* What the program has put into /dev, beside what every container finds there. */
static int in_dev;

static void dev_setup(void)
{
	MUST(mkdir("/dev/own", 0751));
	in_dev = MUST(open("/dev/own/data", O_RDWR | O_CREAT, 0640));
	MUST(write(in_dev, "in memory", 9));
	MUST(symlink("own/data", "/dev/link"));
	MUST(mkfifo("/dev/fifo", 0600));
	MUST(mknod("/dev/nothing", S_IFCHR | 0622, makedev(1, 3)));
	MUST(unlink("/dev/stderr"));
	MUST(unlink("/dev/zero"));
	MUST(mkdir("/dev/zero", 0700));
}
static void dev_check(void)
{
	struct stat stat;
	char bytes[16];
	CHECK(pread(in_dev, bytes, sizeof bytes, 0) == 9 && !memcmp(bytes, "in memory", 9), "its content is another");
	int again = open("/dev/link", O_RDONLY);
	CHECK(again != -1 && read(again, bytes, sizeof bytes) == 9, "the link leads nowhere");
	CHECK(lstat("/dev/own", &stat) == 0 && (stat.st_mode & 07777) == (0751 & ~022), "the folder has mode %o", stat.st_mode);
	CHECK(lstat("/dev/fifo", &stat) == 0 && S_ISFIFO(stat.st_mode), "the FIFO is gone");
	CHECK(lstat("/dev/nothing", &stat) == 0 && stat.st_rdev == makedev(1, 3), "the device is gone");
	CHECK(lstat("/dev/stderr", &stat) == -1, "what was removed is there again");
	CHECK(lstat("/dev/zero", &stat) == 0 && S_ISDIR(stat.st_mode), "what was replaced is there again");
	CHECK(lstat("/dev/null", &stat) == 0 && stat.st_rdev == makedev(1, 3), "what every container has is gone");
}
static void dev_spoil(void) { MUST(unlink("/dev/own/data")); }
STATE(dev)
