/* Mapped files that lost the name they were opened by, and have another: as semaphores of glibc, which are linked to their names. */
#include "state.h"

#include <sys/mman.h>

static const char before[] = "/dev/shm/before", after[] = "/dev/shm/after";

/* A mapping of a file of a page, opened as `before`, which is `after` only by now. */
static char *mapped(int flags)
{
	int fd = MUST(open(before, O_RDWR | O_CREAT | O_EXCL, 0600));
	MUST(ftruncate(fd, 4096));
	MUST(pwrite(fd, "begin", 5, 0));
	char *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, flags, fd, 0);
	CHECK(memory != MAP_FAILED, "cannot map a file");
	MUST(close(fd));
	MUST(link(before, after));
	MUST(unlink(before));
	return memory;
}

static char *mapped_link;

static void mapped_link_setup(void)
{
	mapped_link = mapped(MAP_SHARED);
	memcpy(mapped_link + 100, "shared", 6);
}

static void mapped_link_check(void)
{
	char text[6] = "";
	CHECK(!memcmp(mapped_link, "begin", 5) && !memcmp(mapped_link + 100, "shared", 6), "the content is another");
	int fd = MUST(open(after, O_RDWR));
	MUST(pwrite(fd, "file", 4, 200));
	CHECK(!memcmp(mapped_link + 200, "file", 4), "what is written to the file is not in the mapping");
	memcpy(mapped_link + 300, "memory", 6);
	CHECK(pread(fd, text, 6, 300) == 6 && !memcmp(text, "memory", 6), "what is written to the mapping is not in the file");
	CHECK(access(before, F_OK) == -1, "the old name is back");
}

static void mapped_link_spoil(void) { memset(mapped_link + 100, 0, 6); }

STATE(mapped_link)

static char *mapped_link_private;

static void mapped_link_private_setup(void)
{
	mapped_link_private = mapped(MAP_PRIVATE);
	memcpy(mapped_link_private + 100, "own", 3);
}

static void mapped_link_private_check(void)
{
	char text[3] = "";
	CHECK(!memcmp(mapped_link_private, "begin", 5) && !memcmp(mapped_link_private + 100, "own", 3), "the content is another");
	int fd = MUST(open(after, O_RDONLY));
	CHECK(pread(fd, text, 3, 100) == 3 && memcmp(text, "own", 3), "the file has what was written to a private mapping");
}

static void mapped_link_private_spoil(void) { memset(mapped_link_private + 100, 0, 3); }

STATE(mapped_link_private)

static char *mapped_link_twice;
static pid_t mapped_link_twice_child;

/* Knows the file by its second name, and answers through it. */
static int mapped_link_twice_body(void)
{
	int fd = open(after, O_RDWR);
	volatile char *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		return 2;
	memory[10] = 1;
	until_finishing();
	for (int turn = 0; turn < 5000 && memory[11] != 1; turn++)
		usleep(1000);
	return memory[11] == 1 ? 0 : 1;
}

static void mapped_link_twice_setup(void)
{
	mapped_link_twice = mapped(MAP_SHARED);
	mapped_link_twice_child = in_child(mapped_link_twice_body);
	for (int turn = 0; turn < 5000 && ((volatile char *)mapped_link_twice)[10] != 1; turn++)
		usleep(1000);
	CHECK(((volatile char *)mapped_link_twice)[10] == 1, "the child does not start");
}

static void mapped_link_twice_check(void)
{
	((volatile char *)mapped_link_twice)[11] = 1;
	expect_exit(mapped_link_twice_child, 0);
}

static void mapped_link_twice_spoil(void)
{
	CHECK(mmap(mapped_link_twice, 4096, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == mapped_link_twice, "cannot map over it");
}

STATE(mapped_link_twice)
