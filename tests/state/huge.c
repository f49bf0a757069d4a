/* Explicit huge pages. The harness has made some. */
#include "state.h"

#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/shm.h>

#define HUGE (2L << 20)

static char *map(size_t bytes, int flags, int fd)
{
	char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
	CHECK(at != MAP_FAILED, "failed: mmap");
	return at;
}

/* That a mapping has huge pages shows in how it can be unmapped. */
static bool is_huge(char *at) { return munmap(at, 4096) == -1 && errno == EINVAL; }

static char *huge_at;

static void huge_private_setup(void)
{
	huge_at = map(3 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
	huge_at[5] = 'h';
	memset(huge_at + 2 * HUGE + 1000, 'e', 100000);
}

static void huge_private_check(void)
{
	CHECK(is_huge(huge_at), "its pages are small");
	CHECK(huge_at[5] == 'h' && huge_at[HUGE] == 0 && huge_at[2 * HUGE + 1000] == 'e' && huge_at[2 * HUGE + 100999] == 'e' && huge_at[2 * HUGE + 101000] == 0,
		"another content");
}

static void huge_private_spoil(void) { huge_at[2 * HUGE + 50000] = 0; huge_at[5] = 0; }

STATE(huge_private)

static char *parts_at;

static void huge_protected_setup(void)
{
	parts_at = map(3 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1);
	parts_at[0] = 'a';
	parts_at[HUGE] = 'b';
	MUST(mprotect(parts_at + HUGE, HUGE, PROT_READ));
	MUST(mprotect(parts_at + 2 * HUGE, HUGE, PROT_NONE));
}

static void huge_protected_check(void)
{
	int pipes[2];
	MUST(pipe(pipes));
	CHECK(is_huge(parts_at) && parts_at[0] == 'a' && parts_at[HUGE] == 'b', "another content");
	MUST(write(pipes[1], "xx", 2));
	CHECK(read(pipes[0], parts_at + HUGE, 1) == -1 && errno == EFAULT, "a part can be written");
	CHECK(write(pipes[1], parts_at + 2 * HUGE, 1) == -1 && errno == EFAULT, "a part can be read");
}

static void huge_protected_spoil(void) { parts_at[0] = 0; }

STATE(huge_protected)

static char *shared_at;
static pid_t shared_child;
static int shared_pipe[2];

static int shared_body(void)
{
	char byte;
	shared_at[1] = 'c';
	if (read(shared_pipe[0], &byte, 1) != 1)
		return 2;
	return shared_at[HUGE] == 'p' ? 0 : 1;
}

static void huge_shared_setup(void)
{
	MUST(pipe(shared_pipe));
	shared_at = map(2 * HUGE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1);
	shared_child = in_child(shared_body);
	while (((volatile char *)shared_at)[1] != 'c')
		usleep(1000);
}

static void huge_shared_check(void)
{
	CHECK(is_huge(shared_at) && shared_at[1] == 'c', "another content");
	shared_at[HUGE] = 'p';
	MUST(write(shared_pipe[1], "x", 1));
	expect_exit(shared_child, 0);
}

static void huge_shared_spoil(void) { shared_at[1] = 0; }

STATE(huge_shared)

static int memfd_fd;
static char *memfd_at[2];

static void huge_memfd_setup(void)
{
	memfd_fd = MUST((int)syscall(SYS_memfd_create, "large", MFD_HUGETLB | MFD_ALLOW_SEALING));
	MUST(ftruncate(memfd_fd, 2 * HUGE));
	memfd_at[0] = map(2 * HUGE, MAP_SHARED, memfd_fd);
	memfd_at[0][HUGE + 3] = 'm';
	memfd_at[1] = map(2 * HUGE, MAP_PRIVATE, memfd_fd);
	memfd_at[1][4] = 'p';
	MUST(fcntl(memfd_fd, F_ADD_SEALS, F_SEAL_GROW));
}

static void huge_memfd_check(void)
{
	struct stat status;
	MUST(fstat(memfd_fd, &status));
	CHECK(status.st_blksize == HUGE && status.st_size == 2 * HUGE, "pages of %ld", (long)status.st_blksize);
	CHECK(memfd_at[0][HUGE + 3] == 'm' && memfd_at[0][4] == 0 && memfd_at[1][4] == 'p' && memfd_at[1][HUGE + 3] == 'm', "another content");
	CHECK(ftruncate(memfd_fd, 3 * HUGE) == -1 && errno == EPERM, "it grows");
}

static void huge_memfd_spoil(void) { memfd_at[1][4] = 0; }

STATE(huge_memfd)

static int segment_id;
static char *segment_at;

static void huge_segment_setup(void)
{
	segment_id = MUST(shmget(IPC_PRIVATE, 2 * HUGE, IPC_CREAT | SHM_HUGETLB | 0600));
	segment_at = MUST(shmat(segment_id, NULL, 0));
	segment_at[HUGE] = 'v';
}

static void huge_segment_check(void)
{
	CHECK(is_huge(segment_at) && segment_at[HUGE] == 'v', "another content");
	char *again = MUST(shmat(segment_id, NULL, 0));
	again[0] = 'n';
	CHECK(segment_at[0] == 'n', "another segment");
}

static void huge_segment_spoil(void) { segment_at[HUGE] = 0; }

STATE(huge_segment, .privileged = true)

static char *transparent;

static void huge_transparent_setup(void)
{
	char *at = map(6 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	transparent = (char *)(((uintptr_t)at + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
	MUST(madvise(transparent, 4 * HUGE, MADV_HUGEPAGE));
	for (long byte = 0; byte < 4 * HUGE; byte += 4096)
		transparent[byte] = (char)(byte >> 12);
	MUST(madvise(transparent + HUGE + 8192, 4096, MADV_DONTNEED));
}

static void huge_transparent_check(void)
{
	for (long byte = 0; byte < 4 * HUGE; byte += 4096)
		CHECK(transparent[byte] == (byte == HUGE + 8192 ? 0 : (char)(byte >> 12)), "another content at %ld", byte);
}

static void huge_transparent_spoil(void) { transparent[3 * HUGE + 4096] ^= 1; }

STATE(huge_transparent)
