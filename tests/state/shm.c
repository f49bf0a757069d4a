/* POSIX shared memory, and what processes synchronize with in it. */
#include "state.h"

#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>

#define PAGE 4096

static void *map(int fd, size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(at != MAP_FAILED, "failed: mmap");
	return at;
}

static void *shared(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED, "failed: mmap");
	return at;
}

static int go[2];

static void wait_go(void)
{
	char byte;
	if (read(go[0], &byte, 1) != 1)
		_exit(9);
}

static void say_go(void) { MUST(write(go[1], "g", 1)); }

/* Behind the end of a file, in its last page: memory that a program has got by mistake, and that stays. */
enum { ENDS = 3, END = PAGE + 100 };
static char *end_at[ENDS];
static struct stat end_before[ENDS];

static void shm_behind_end_setup(void)
{
	int fds[] = {
		MUST(shm_open("/short", O_RDWR | O_CREAT | O_EXCL, 0600)),
		MUST(shm_open("/short-lived", O_RDWR | O_CREAT | O_EXCL, 0600)),
		MUST(memfd_create("short", 0)),
	};
	for (int i = 0; i < ENDS; i++) {
		MUST(ftruncate(fds[i], END));
		end_at[i] = map(fds[i], 2 * PAGE);
		strcpy(end_at[i] + END + 200, "behind");
		end_at[i][2 * PAGE - 1] = (char)i;
		MUST(mprotect(end_at[i], 2 * PAGE, PROT_READ));
		MUST(fstat(fds[i], &end_before[i]));
		close(fds[i]);
	}
	MUST(shm_unlink("/short-lived"));
	/* Who can't write to it, and nobody else can see it meanwhile. */
	int fd = MUST(shm_open("/short", O_RDONLY, 0));
	MUST(munmap(end_at[0], 2 * PAGE));
	end_at[0] = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(end_at[0] != MAP_FAILED && ((volatile char *)end_at[0])[END + 200] == 'b', "failed: mmap");
	close(fd);
}

static void shm_behind_end_check(void)
{
	for (int i = 0; i < ENDS; i++) {
		CHECK(!strcmp(end_at[i] + END + 200, "behind"), "%d: it has %.10s", i, end_at[i] + END + 200);
		CHECK(end_at[i][2 * PAGE - 1] == i, "%d: its last byte is %d", i, end_at[i][2 * PAGE - 1]);
		CHECK(end_at[i][END] == 0, "%d: %d was not there", i, end_at[i][END]);
	}
	struct stat now;
	MUST(stat("/dev/shm/short", &now));
	CHECK(now.st_size == END, "it has %ld bytes", now.st_size);
	CHECK(now.st_mtime == end_before[0].st_mtime, "it was changed");
}

static void shm_behind_end_spoil(void)
{
	int fd = MUST(open("/dev/shm/short", O_RDWR));
	char *at = map(fd, 2 * PAGE);
	at[END + 200] = 'B';
}
STATE(shm_behind_end)

static int named_fd;
static char *named_at;
static pid_t named_child;

static int named_body(void)
{
	int fd = MUST(shm_open("/named", O_RDWR, 0));
	char *at = map(fd, 3 * PAGE);
	at[0] = 'c';
	wait_go();
	return at[PAGE] == 'p' ? 0 : 1;
}

static void shm_named_setup(void)
{
	MUST(pipe(go));
	named_fd = MUST(shm_open("/named", O_RDWR | O_CREAT | O_EXCL, 0640));
	MUST(ftruncate(named_fd, 2 * PAGE + 100));
	named_at = map(named_fd, 3 * PAGE);
	named_child = in_child(named_body);
	while (((volatile char *)named_at)[0] != 'c')
		usleep(1000);
}

static void shm_named_check(void)
{
	struct stat status;
	MUST(stat("/dev/shm/named", &status));
	CHECK(status.st_size == 2 * PAGE + 100 && (status.st_mode & 07777) == 0640, "size %ld, mode %o", status.st_size, status.st_mode);
	CHECK(named_at[0] == 'c', "another content");
	named_at[PAGE] = 'p';
	say_go();
	expect_exit(named_child, 0);
	char byte;
	CHECK(pread(named_fd, &byte, 1, PAGE) == 1 && byte == 'p', "the descriptor leads elsewhere");
	int fd = MUST(shm_open("/named", O_RDONLY, 0));
	CHECK(pread(fd, &byte, 1, PAGE) == 1 && byte == 'p', "the name leads elsewhere");
}

static void shm_named_spoil(void) { named_at[0] = 0; }

STATE(shm_named)

static int unlinked_fd;
static char *unlinked_at;
static pid_t unlinked_child;

static int unlinked_body(void)
{
	wait_go();
	return unlinked_at[0] == 'p' && unlinked_at[3 * PAGE] == 'g' ? 0 : 1;
}

/* Unlinked while mapped, grown after it. */
static void shm_unlinked_setup(void)
{
	MUST(pipe(go));
	unlinked_fd = MUST(shm_open("/unlinked", O_RDWR | O_CREAT, 0600));
	MUST(ftruncate(unlinked_fd, PAGE));
	unlinked_at = map(unlinked_fd, 4 * PAGE);
	MUST(shm_unlink("/unlinked"));
	unlinked_child = in_child(unlinked_body);
	MUST(ftruncate(unlinked_fd, 4 * PAGE));
	unlinked_at[3 * PAGE] = 'g';
}

static void shm_unlinked_check(void)
{
	CHECK(access("/dev/shm/unlinked", F_OK) == -1, "it has a name again");
	CHECK(unlinked_at[3 * PAGE] == 'g', "another content");
	unlinked_at[0] = 'p';
	say_go();
	expect_exit(unlinked_child, 0);
	MUST(ftruncate(unlinked_fd, 2 * PAGE));
	MUST(ftruncate(unlinked_fd, 4 * PAGE));
	CHECK(unlinked_at[3 * PAGE] == 0, "the descriptor is for another object than the mapping");
}

static void shm_unlinked_spoil(void) { unlinked_at[3 * PAGE] = 0; }

STATE(shm_unlinked)

static char *closed_at;

static void shm_unlinked_closed_setup(void)
{
	int fd = MUST(shm_open("/closed", O_RDWR | O_CREAT, 0600));
	MUST(ftruncate(fd, 8 * PAGE));
	closed_at = map(fd, 8 * PAGE);
	memset(closed_at + 7 * PAGE, 'z', PAGE);
	MUST(close(fd));
	MUST(shm_unlink("/closed"));
}

static void shm_unlinked_closed_check(void) { CHECK(closed_at[8 * PAGE - 1] == 'z' && closed_at[0] == 0, "another content"); }
static void shm_unlinked_closed_spoil(void) { closed_at[8 * PAGE - 1] = 0; }

STATE(shm_unlinked_closed)

static char *short_at;

static void shm_truncated_setup(void)
{
	int fd = MUST(shm_open("/short", O_RDWR | O_CREAT, 0600));
	MUST(ftruncate(fd, 4 * PAGE));
	short_at = map(fd, 4 * PAGE);
	memset(short_at, 's', 4 * PAGE);
	MUST(ftruncate(fd, PAGE));
	MUST(close(fd));
}

static void shm_truncated_check(void)
{
	int pipes[2];
	MUST(pipe(pipes));
	CHECK(short_at[PAGE - 1] == 's', "another content");
	CHECK(write(pipes[1], short_at + PAGE, 1) == -1 && errno == EFAULT, "there is memory behind the end");
	MUST(truncate("/dev/shm/short", 2 * PAGE));
	CHECK(short_at[PAGE] == 0, "the mapping is of another object than the name");
}

static void shm_truncated_spoil(void) { short_at[PAGE - 1] = 0; }

STATE(shm_truncated)

static sem_t *semaphore;
static pid_t semaphore_child;

static int semaphore_body(void)
{
	sem_t *own = sem_open("/semaphore", 0);
	if (own == SEM_FAILED)
		return 2;
	return sem_wait(own) == 0 ? 0 : 1;
}

static void shm_semaphore_setup(void)
{
	semaphore = sem_open("/semaphore", O_CREAT | O_EXCL, 0600, 1);
	CHECK(semaphore != SEM_FAILED, "failed: sem_open");
	MUST(sem_wait(semaphore));
	semaphore_child = in_child(semaphore_body);
	usleep(50000);
}

static void shm_semaphore_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a waiting process has ended");
	int value;
	MUST(sem_getvalue(semaphore, &value));
	CHECK(value == 0, "value %d", value);
	MUST(sem_post(semaphore));
	expect_exit(semaphore_child, 0);
	MUST(sem_getvalue(semaphore, &value));
	CHECK(value == 0, "value %d after it was taken", value);
}

static void shm_semaphore_spoil(void) { MUST(sem_post(semaphore)); }

STATE(shm_semaphore)

static struct { pthread_mutex_t mutex; pthread_cond_t condition; int value; pid_t owner; } *sync_at;
static pid_t sync_children[3];

static void make_mutex(int robust)
{
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attributes, robust);
	pthread_mutex_init(&sync_at->mutex, &attributes);
	pthread_condattr_t condition;
	pthread_condattr_init(&condition);
	pthread_condattr_setpshared(&condition, PTHREAD_PROCESS_SHARED);
	pthread_cond_init(&sync_at->condition, &condition);
}

static int adder_body(void)
{
	if (pthread_mutex_lock(&sync_at->mutex))
		return 1;
	sync_at->value++;
	return pthread_mutex_unlock(&sync_at->mutex);
}

/* Several wait for a mutex that this process has. */
static void shm_mutex_setup(void)
{
	sync_at = shared(PAGE);
	make_mutex(PTHREAD_MUTEX_STALLED);
	pthread_mutex_lock(&sync_at->mutex);
	for (int index = 0; index < 3; index++)
		sync_children[index] = in_child(adder_body);
	usleep(50000);
}

static void shm_mutex_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0 && sync_at->value == 0, "somebody has got it");
	CHECK(pthread_mutex_trylock(&sync_at->mutex) == EBUSY, "nobody has it");
	CHECK(pthread_mutex_unlock(&sync_at->mutex) == 0, "it can't be released");
	for (int index = 0; index < 3; index++)
		expect_exit(sync_children[index], 0);
	CHECK(sync_at->value == 3, "value %d", sync_at->value);
}

static void shm_mutex_spoil(void) { sync_at->value = 1; }

STATE(shm_mutex)

static int dying_body(void)
{
	pthread_mutex_lock(&sync_at->mutex);
	sync_at->owner = getpid();
	for (;;)
		pause();
	return 0;
}

static int heir_body(void)
{
	int result = pthread_mutex_lock(&sync_at->mutex);
	if (result != EOWNERDEAD)
		return 1;
	pthread_mutex_consistent(&sync_at->mutex);
	sync_at->value = 5;
	return pthread_mutex_unlock(&sync_at->mutex);
}

/* The owner dies after the restore, and one that waits inherits. */
static void shm_robust_mutex_setup(void)
{
	sync_at = shared(PAGE);
	make_mutex(PTHREAD_MUTEX_ROBUST);
	sync_children[0] = in_child(dying_body);
	while (!((volatile __typeof__(sync_at))sync_at)->owner)
		usleep(1000);
	sync_children[1] = in_child(heir_body);
	usleep(50000);
}

static void shm_robust_mutex_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "somebody has ended");
	MUST(kill(sync_children[0], SIGKILL));
	MUST(waitpid(sync_children[0], NULL, 0));
	expect_exit(sync_children[1], 0);
	CHECK(sync_at->value == 5, "value %d", sync_at->value);
}

static void shm_robust_mutex_spoil(void) { MUST(kill(sync_children[1], SIGKILL)); }

STATE(shm_robust_mutex)

static int condition_body(void)
{
	struct timespec limit;
	clock_gettime(CLOCK_REALTIME, &limit);
	limit.tv_sec += 300;
	pthread_mutex_lock(&sync_at->mutex);
	while (!sync_at->value)
		if (pthread_cond_timedwait(&sync_at->condition, &sync_at->mutex, &limit))
			return 1;
	return pthread_mutex_unlock(&sync_at->mutex);
}

static void shm_condition_setup(void)
{
	sync_at = shared(PAGE);
	make_mutex(PTHREAD_MUTEX_STALLED);
	for (int index = 0; index < 3; index++)
		sync_children[index] = in_child(condition_body);
	usleep(50000);
}

static void shm_condition_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "somebody has ended");
	pthread_mutex_lock(&sync_at->mutex);
	sync_at->value = 1;
	pthread_cond_broadcast(&sync_at->condition);
	pthread_mutex_unlock(&sync_at->mutex);
	for (int index = 0; index < 3; index++)
		expect_exit(sync_children[index], 0);
}

static void shm_condition_spoil(void) { MUST(kill(sync_children[2], SIGKILL)); }

STATE(shm_condition)

static uint32_t *futex_words;
static pid_t futex_child;

static int futex_body(void)
{
	return syscall(SYS_futex, futex_words + 100, FUTEX_WAIT, 7, NULL) == 0 ? 0 : 1;
}

/* Two processes have the same word at different addresses. */
static void shm_futex_setup(void)
{
	int fd = MUST(shm_open("/futex", O_RDWR | O_CREAT, 0600));
	MUST(ftruncate(fd, PAGE));
	futex_words = map(fd, PAGE);
	futex_words[100] = 7;
	futex_child = in_child(futex_body);
	usleep(50000);
	futex_words = map(fd, PAGE);
}

static void shm_futex_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "the waiting process has ended");
	CHECK(syscall(SYS_futex, futex_words + 100, FUTEX_WAKE, 10) == 1, "nobody waits");
	expect_exit(futex_child, 0);
}

static void shm_futex_spoil(void) { MUST(kill(futex_child, SIGKILL)); }

STATE(shm_futex)
