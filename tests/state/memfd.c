/* memfds: content, seals, positions, and every way to map them. */
#include "state.h"

#include <linux/memfd.h>
#include <sys/mman.h>

#define PAGE 4096
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x20
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

static int memfd(const char *name, unsigned flags, off_t bytes)
{
	int fd = MUST((int)syscall(SYS_memfd_create, name, flags));
	MUST(ftruncate(fd, bytes));
	return fd;
}

static char *map(int fd, size_t bytes, int protection, int flags)
{
	char *at = mmap(NULL, bytes, protection, flags, fd, 0);
	CHECK(at != MAP_FAILED, "failed: mmap");
	return at;
}

/* A program in memory can be run although its descriptor would write to it. */
static int program_fd;
static void memfd_program_setup(void)
{
	char buffer[65536];
	ssize_t got;
	int from = MUST(open("/proc/self/exe", O_RDONLY));
	program_fd = memfd("program", MFD_CLOEXEC, 0);
	while ((got = MUST(read(from, buffer, sizeof buffer))) > 0)
		MUST(write(program_fd, buffer, (size_t)got));
	close(from);
}
static int memfd_run(void)
{
	char *arguments[] = {"state", NULL}, *environment[] = {NULL};
	close(2);
	syscall(SYS_execveat, program_fd, "", arguments, environment, AT_EMPTY_PATH);
	return errno;
}
static void memfd_program_check(void)
{
	CHECK(lseek(program_fd, 0, SEEK_CUR) > PAGE, "its position");
	/* Without arguments it says how it is used. */
	expect_exit(in_child(memfd_run), 2);
}
static void memfd_program_spoil(void) { MUST(ftruncate(program_fd, 10)); }
STATE(memfd_program)

static int private_fd;
static char *private_at, *private_shared;

static void memfd_private_setup(void)
{
	private_fd = memfd("views", 0, 4 * PAGE);
	private_shared = map(private_fd, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	memset(private_shared, 's', 4 * PAGE);
	private_at = map(private_fd, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	private_at[PAGE] = 'p';
	memset(private_at + 2 * PAGE, 0, PAGE);
}

static void memfd_private_check(void)
{
	CHECK(private_at[0] == 's' && private_at[PAGE] == 'p' && private_at[PAGE + 1] == 's', "another private view");
	CHECK(private_at[2 * PAGE] == 0, "a page of zeros is the object's again");
	CHECK(private_shared[PAGE] == 's' && private_shared[2 * PAGE] == 's', "the object has what is private");
	private_shared[3 * PAGE] = 'n';
	CHECK(private_at[3 * PAGE] == 'n', "what was not written is not the object's");
	CHECK(strstr(content("/proc/self/maps"), "/memfd:views (deleted)"), "another name");
}

static void memfd_private_spoil(void) { private_at[2 * PAGE] = 1; }

STATE(memfd_private)

static char *lone_at;

/* Only a private view is left. */
static void memfd_private_closed_setup(void)
{
	int fd = memfd("lone", 0, 3 * PAGE);
	MUST(pwrite(fd, "object", 6, PAGE));
	lone_at = map(fd, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	lone_at[0] = 'm';
	MUST(close(fd));
}

static void memfd_private_closed_check(void)
{
	CHECK(lone_at[0] == 'm' && !memcmp(lone_at + PAGE, "object", 6) && lone_at[2 * PAGE] == 0, "another content");
}

static void memfd_private_closed_spoil(void) { lone_at[PAGE] = 'O'; }

STATE(memfd_private_closed)

static int odd_fd;
static char *odd_at;

/* A name with characters that the list of mappings writes in another way. */
static void memfd_odd_name_setup(void)
{
	odd_fd = memfd("a\nb\\012 c", 0, PAGE);
	odd_at = map(odd_fd, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
}

static void memfd_odd_name_check(void)
{
	char path[64], link[128] = "";
	sprintf(path, "/proc/self/fd/%d", odd_fd);
	MUST(readlink(path, link, sizeof link - 1));
	CHECK(!strcmp(link, "/memfd:a\nb\\012 c (deleted)"), "its name is %s", link);
	odd_at[0] = 'm';
	char byte;
	CHECK(MUST(pread(odd_fd, &byte, 1, 0)) == 1 && byte == 'm', "the mapping is of another object");
}

static void memfd_odd_name_spoil(void) { MUST(dup2(MUST(open("/dev/null", O_RDONLY)), odd_fd)); }

STATE(memfd_odd_name)

static int position_fds[3];

static void memfd_positions_setup(void)
{
	position_fds[0] = memfd("positions", MFD_CLOEXEC, 0);
	MUST(write(position_fds[0], "0123456789", 10));
	position_fds[1] = MUST(dup(position_fds[0]));
	char path[64];
	sprintf(path, "/proc/self/fd/%d", position_fds[0]);
	position_fds[2] = MUST(open(path, O_RDONLY));
	MUST(lseek(position_fds[1], 4, SEEK_SET));
	MUST(lseek(position_fds[2], 8, SEEK_SET));
	MUST(fchmod(position_fds[0], 0640));
	MUST(fchown(position_fds[0], 1000, 100));
}

static void memfd_positions_check(void)
{
	char text[4];
	CHECK(read(position_fds[0], text, 2) == 2 && !memcmp(text, "45", 2), "another position");
	CHECK(lseek(position_fds[1], 0, SEEK_CUR) == 6, "a duplicate has a position of its own");
	CHECK(read(position_fds[2], text, 4) == 2 && !memcmp(text, "89", 2), "another position, or length");
	CHECK(write(position_fds[2], "x", 1) == -1 && errno == EBADF, "a descriptor for reading can write");
	struct stat status;
	MUST(fstat(position_fds[2], &status));
	CHECK(status.st_size == 10 && (status.st_mode & 07777) == 0640 && status.st_uid == 1000 && status.st_gid == 100, "another owner or mode");
	CHECK(MUST(fcntl(position_fds[0], F_GETFD)) == FD_CLOEXEC && MUST(fcntl(position_fds[1], F_GETFD)) == 0, "other descriptor flags");
}

static void memfd_positions_spoil(void) { MUST(lseek(position_fds[0], 5, SEEK_SET)); }

STATE(memfd_positions)

static int seal_fds[8];
static const int seals[8] = {
	0, F_SEAL_SEAL, F_SEAL_WRITE, F_SEAL_GROW | F_SEAL_SHRINK, F_SEAL_FUTURE_WRITE, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL,
	F_SEAL_EXEC, F_SEAL_SHRINK,
};

static void memfd_seals_setup(void)
{
	for (int index = 0; index < 8; index++) {
		seal_fds[index] = memfd("sealed", MFD_ALLOW_SEALING | (index == 6 ? MFD_NOEXEC_SEAL : 0), PAGE + 5);
		MUST(pwrite(seal_fds[index], "content", 7, 2));
		MUST(fcntl(seal_fds[index], F_ADD_SEALS, seals[index]));
	}
}

static void memfd_seals_check(void)
{
	char text[7];
	for (int index = 0; index < 8; index++) {
		int fd = seal_fds[index];
		CHECK(MUST(fcntl(fd, F_GET_SEALS)) == seals[index], "memfd %d has the seals %#x", index, fcntl(fd, F_GET_SEALS));
		CHECK(pread(fd, text, 7, 2) == 7 && !memcmp(text, "content", 7), "memfd %d has another content", index);
		int denied = seals[index] & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE);
		CHECK((pwrite(fd, "x", 1, 0) == 1) == !denied, "memfd %d can be written, or not", index);
	}
	CHECK(ftruncate(seal_fds[3], 1) == -1 && ftruncate(seal_fds[3], 3 * PAGE) == -1, "a sealed memfd changed its size");
	CHECK(ftruncate(seal_fds[7], 1) == -1 && ftruncate(seal_fds[7], 3 * PAGE) == 0, "a memfd that may grow");
	CHECK(fcntl(seal_fds[1], F_ADD_SEALS, F_SEAL_GROW) == -1 && errno == EPERM, "one that may get no more seals gets one");
	CHECK(fchmod(seal_fds[6], 0777) == -1 && errno == EPERM, "it can become executable");
	struct stat status;
	MUST(fstat(seal_fds[6], &status));
	CHECK((status.st_mode & 0111) == 0, "mode %o", status.st_mode);
}

static void memfd_seals_spoil(void) { MUST(fcntl(seal_fds[0], F_ADD_SEALS, F_SEAL_GROW)); }

STATE(memfd_seals)

static int unsealable_fd;

static void memfd_unsealable_setup(void) { unsealable_fd = memfd("unsealable", 0, 100); }

static void memfd_unsealable_check(void)
{
	CHECK(MUST(fcntl(unsealable_fd, F_GET_SEALS)) == F_SEAL_SEAL, "seals %#x", fcntl(unsealable_fd, F_GET_SEALS));
	CHECK(fcntl(unsealable_fd, F_ADD_SEALS, F_SEAL_WRITE) == -1 && errno == EPERM, "it can be sealed");
	struct stat status;
	MUST(fstat(unsealable_fd, &status));
	CHECK(status.st_size == 100, "size %ld", status.st_size);
}

static void memfd_unsealable_spoil(void) { MUST(ftruncate(unsealable_fd, 101)); }

STATE(memfd_unsealable)

static int future_fd;
static char *future_at;

/* What was mapped before the seal can be written, nothing else. */
static void memfd_future_write_setup(void)
{
	future_fd = memfd("future", MFD_ALLOW_SEALING, 2 * PAGE);
	future_at = map(future_fd, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	MUST(fcntl(future_fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
	future_at[0] = 'f';
}

static void memfd_future_write_check(void)
{
	future_at[PAGE] = 'g';
	char byte;
	CHECK(pread(future_fd, &byte, 1, PAGE) == 1 && byte == 'g' && future_at[0] == 'f', "the mapping has other memory");
	CHECK(pwrite(future_fd, "x", 1, 0) == -1 && errno == EPERM, "it can be written");
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, future_fd, 0) == MAP_FAILED && errno == EPERM, "it can be mapped writable");
}

static void memfd_future_write_spoil(void) { future_at[0] = 'F'; }

STATE(memfd_future_write)

static int reader_fd;
static char *reader_at, *reader_own;

static void memfd_sealed_mapped_setup(void)
{
	reader_fd = memfd("readers", MFD_ALLOW_SEALING, 3 * PAGE);
	MUST(pwrite(reader_fd, "read me", 7, 2 * PAGE));
	MUST(fcntl(reader_fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
	char path[64];
	sprintf(path, "/proc/self/fd/%d", reader_fd);
	int fd = MUST(open(path, O_RDONLY));
	reader_at = map(fd, 3 * PAGE, PROT_READ, MAP_SHARED);
	reader_own = map(fd, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	reader_own[0] = 'o';
	MUST(close(fd));
}

static void memfd_sealed_mapped_check(void)
{
	CHECK(!memcmp(reader_at + 2 * PAGE, "read me", 7) && !memcmp(reader_own + 2 * PAGE, "read me", 7), "another content");
	CHECK(reader_own[0] == 'o' && reader_at[0] == 0, "another private content");
	CHECK(mprotect(reader_at, PAGE, PROT_READ | PROT_WRITE) == -1, "a mapping for reading can become writable");
}

static void memfd_sealed_mapped_spoil(void) { reader_own[0] = 'p'; }

STATE(memfd_sealed_mapped)

static int sparse_fd;

static void memfd_sparse_setup(void)
{
	sparse_fd = memfd("sparse", 0, (6L << 30) + 123);
	MUST(pwrite(sparse_fd, "far", 3, 5L << 30));
	MUST(pwrite(sparse_fd, "end", 3, (6L << 30) + 120));
}

static void memfd_sparse_check(void)
{
	struct stat status;
	char text[3];
	MUST(fstat(sparse_fd, &status));
	CHECK(status.st_size == (6L << 30) + 123, "size %ld", status.st_size);
	CHECK(status.st_blocks <= 64, "%ld blocks", status.st_blocks);
	CHECK(pread(sparse_fd, text, 3, 5L << 30) == 3 && !memcmp(text, "far", 3), "another content");
	CHECK(pread(sparse_fd, text, 3, (6L << 30) + 120) == 3 && !memcmp(text, "end", 3), "another end");
}

static void memfd_sparse_spoil(void) { MUST(pwrite(sparse_fd, "e", 1, 5L << 30)); }

STATE(memfd_sparse)

static int shared_fd;
static char *shared_at;
static pid_t shared_child;
static int shared_pipe[2];

static int shared_body(void)
{
	char byte;
	char *at = map(shared_fd, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	at[1] = 'c';
	if (read(shared_pipe[0], &byte, 1) != 1)
		return 2;
	at[2] = at[0];
	return lseek(shared_fd, 0, SEEK_CUR) == 77 ? 0 : 1;
}

static void memfd_shared_setup(void)
{
	MUST(pipe(shared_pipe));
	shared_fd = memfd("both", 0, 2 * PAGE);
	shared_at = map(shared_fd, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	shared_child = in_child(shared_body);
	while (((volatile char *)shared_at)[1] != 'c')
		usleep(1000);
}

static void memfd_shared_check(void)
{
	MUST(lseek(shared_fd, 77, SEEK_SET));
	shared_at[0] = 'p';
	MUST(write(shared_pipe[1], "x", 1));
	expect_exit(shared_child, 0);
	CHECK(shared_at[1] == 'c' && shared_at[2] == 'p', "they do not share it");
}

static void memfd_shared_spoil(void) { shared_at[1] = 0; }

STATE(memfd_shared)

static char *truncated_at;

/* A mapping reaches further than its object. */
static void memfd_truncated_setup(void)
{
	int fd = memfd("truncated", 0, 4 * PAGE);
	truncated_at = map(fd, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	memset(truncated_at, 't', 4 * PAGE);
	MUST(ftruncate(fd, PAGE + 10));
}

static void memfd_truncated_check(void)
{
	int pipes[2];
	MUST(pipe(pipes));
	CHECK(truncated_at[0] == 't' && truncated_at[PAGE + 9] == 't' && truncated_at[PAGE + 10] == 0, "another content");
	CHECK(write(pipes[1], truncated_at + 2 * PAGE, 1) == -1 && errno == EFAULT, "there is memory behind the end");
}

static void memfd_truncated_spoil(void) { truncated_at[PAGE + 9] = 0; }

STATE(memfd_truncated)
