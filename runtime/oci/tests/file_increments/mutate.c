// Changes files in every way that the test knows, at random: mutate SEED FOLDER...
//
// Some of it leaves no trace in a file's times, or less than one would think: stores through mappings, writes within a tick, calls that
// take long. Ends with a line on standard error if a call fails that must not.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define MIB (1 << 20)
#define LARGE (9 * MIB)

static uint64_t state;
static char *folder;
static unsigned char *buffer;

static uint64_t draw(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state >> 11) % below;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(1);
}

static void fill(size_t count)
{
	unsigned char key = draw(256);
	for (size_t i = 0; i < count; i++)
		buffer[i] = key + i * 7 + (i >> 9);
}

static const char *path(const char *name, unsigned number)
{
	static char paths[4][256];
	static int next;
	char *made = paths[next = (next + 1) % 4];
	snprintf(made, 256, "%s/%s%u", folder, name, number);
	return made;
}

static int open_or_make(const char *name, int flags)
{
	int fd = open(name, flags | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		fail("open");
	return fd;
}

static void put(int fd, size_t count, off_t at)
{
	fill(count);
	if (pwrite(fd, buffer, count, at) != (ssize_t)count)
		fail("pwrite");
}

/* A thread that stores through a mapping of its own from time to time, for as long as the program runs. */
struct mapped {
	volatile unsigned char *at;
	unsigned seed;
};

static void *store_on(void *argument)
{
	struct mapped *mapped = argument;
	for (;;) {
		mapped->at[rand_r(&mapped->seed) % (2 * MIB)]++;
		usleep(rand_r(&mapped->seed) % 3000);
	}
	return NULL;
}

static void map_for_good(void)
{
	int fd = open_or_make(path("mapped", 0), O_RDWR);
	if (ftruncate(fd, 2 * MIB))
		fail("ftruncate");
	struct mapped *mapped = malloc(sizeof *mapped);
	mapped->at = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	mapped->seed = draw(1 << 30);
	if (mapped->at == MAP_FAILED)
		fail("mmap");
	close(fd);
	pthread_t thread;
	if (pthread_create(&thread, NULL, store_on, mapped))
		fail("pthread_create");
}

/* Mappings that come and go: stores to pages that were read, or stored to, before. */
static void *volatile kept_mapping;
static size_t kept_bytes;

static void change(void)
{
	unsigned number = draw(4);
	int fd;
	struct stat stat;
	switch (draw(20)) {
	case 0: /* a small file, anew */
		fd = open_or_make(path("small", draw(200)), O_WRONLY | O_TRUNC);
		put(fd, 1 + draw(20000), 0);
		close(fd);
		break;
	case 1: /* a log that grows, up to a size */
		fd = open_or_make(path("log", number), O_WRONLY | O_APPEND);
		put(fd, 1 + draw(200000), 0);
		if (!fstat(fd, &stat) && stat.st_size > 12 * MIB)
			ftruncate(fd, draw(MIB));
		close(fd);
		break;
	case 2: /* a few bytes in the midst of a large file */
	case 3:
		fd = open_or_make(path("large", number), O_WRONLY);
		put(fd, 1 + draw(5000), draw(LARGE));
		close(fd);
		break;
	case 4: /* other content of the same length, by way of nothing */
		fd = open_or_make(path("large", number), O_WRONLY);
		if (!fstat(fd, &stat)) {
			ftruncate(fd, stat.st_size / 2);
			put(fd, 1 + draw(3000), stat.st_size - 3000 > 0 ? stat.st_size - 3000 : 0);
			ftruncate(fd, stat.st_size);
		}
		close(fd);
		break;
	case 5: /* read through a mapping, and then stored to */
	case 6:
		fd = open_or_make(path("large", number), O_RDWR);
		if (!fstat(fd, &stat) && stat.st_size > 2 * MIB) {
			volatile unsigned char *at =
				mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
			if (at == MAP_FAILED)
				fail("mmap");
			size_t where = draw(2 * MIB);
			unsigned char was = at[where];
			usleep(draw(3) * 30000);
			at[where] = was + 1;
			usleep(draw(3) * 30000);
			at[where] = was + 3;
			munmap((void *)at, 2 * MIB);
		}
		close(fd);
		break;
	case 7: /* a mapping that is kept until the next of its kind, and stored to again just before it goes */
		if (kept_mapping) {
			((volatile unsigned char *)kept_mapping)[draw(kept_bytes)]++;
			if (draw(2)) {
				munmap(kept_mapping, kept_bytes);
				kept_mapping = NULL;
			}
			break;
		}
		fd = open_or_make(path("large", number), O_RDWR);
		if (!fstat(fd, &stat) && stat.st_size > MIB) {
			kept_bytes = MIB;
			void *at = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
			if (at == MAP_FAILED)
				fail("mmap");
			for (size_t i = 0; i < MIB; i += 4096)
				((volatile unsigned char *)at)[i]++;
			kept_mapping = at;
		}
		close(fd);
		break;
	case 8: /* another file takes the name */
		fd = open_or_make(path("new", 0), O_WRONLY | O_TRUNC);
		put(fd, draw(4) ? 3 * MIB : 3000, 0);
		close(fd);
		if (rename(path("new", 0), path("large", number)))
			fail("rename");
		break;
	case 9: /* names come and go */
		if (link(path("large", number), path("link", draw(3))) && errno != EEXIST && errno != ENOENT)
			fail("link");
		break;
	case 10:
		unlink(path(draw(2) ? "link" : "small", draw(200)));
		break;
	case 11: /* metadata, and back again */
		chmod(path("small", draw(200)), 0600 + draw(64));
		chmod(path("large", number), 0600 + draw(64));
		break;
	case 12:
		fill(40);
		setxattr(path("large", number), "trusted.test", buffer, draw(40), 0);
		setxattr(path("small", draw(200)), "trusted.test", buffer, draw(40), 0);
		break;
	case 13: { /* times that say nothing */
		struct timespec times[2] = {{ 1000, draw(1000000) }, { 1000, draw(4) }};
		utimensat(AT_FDCWD, path("large", number), times, 0);
		break;
	}
	case 14:
		mkdir(path("folder", number), 0700);
		symlink("somewhere", path("folder", number));
		unlink(path("symlink", number));
		symlink(path("", draw(1000)), path("symlink", number));
		fd = open(path("low", number), O_WRONLY | O_APPEND | O_CLOEXEC);
		if (fd >= 0) {
			put(fd, 1 + draw(5000), 0);
			close(fd);
		}
		break;
	case 15:
		rename(path("folder", number), path("folder", draw(8)));
		rmdir(path("folder", draw(8)));
		break;
	case 16: /* holes */
		fd = open_or_make(path("sparse", number), O_WRONLY);
		put(fd, 1 + draw(9000), draw(64) * MIB);
		if (draw(2))
			fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, draw(64) * MIB, MIB);
		if (!draw(4))
			ftruncate(fd, draw(64) * MIB);
		close(fd);
		break;
	case 17: /* one call that takes its time */
		fd = open_or_make(path("long", 0), O_WRONLY);
		put(fd, 24 * MIB, draw(3) * 4096);
		close(fd);
		break;
	case 18: /* past the page cache */
		fd = open(path("direct", 0), O_WRONLY | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
		if (fd >= 0) {
			fill(MIB);
			pwrite(fd, buffer, MIB, draw(3) * MIB);
			close(fd);
		}
		break;
	case 19: /* nothing, for as long as times need to prove something */
		usleep(draw(2) * 120000);
		break;
	}
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	state = strtoull(argv[1], NULL, 10) * 0x9e3779b97f4a7c15 + 1;
	buffer = aligned_alloc(4096, 32 * MIB);
	memset(buffer, 1, 32 * MIB);
	for (int i = 2; i < argc; i++) {
		folder = argv[i];
		for (unsigned number = 0; number < 4; number++) {
			int fd = open_or_make(path("large", number), O_WRONLY);
			put(fd, LARGE, 0);
			close(fd);
		}
		for (unsigned number = 0; number < 200; number++) {
			int fd = open_or_make(path("small", number), O_WRONLY);
			put(fd, 100 + draw(20000), 0);
			close(fd);
		}
		map_for_good();
	}
	int fd = open_or_make(path("ready", 0), O_WRONLY);
	close(fd);
	for (;;) {
		folder = argv[2 + draw(argc - 2)];
		change();
		usleep(draw(4) * 500);
	}
}
