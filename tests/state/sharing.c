/* What processes share by clone, and threads do not by unshare. */
#include "state.h"
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define SIGNALS_TOO (CLONE_SIGHAND | CLONE_VM)

static char stacks[4][65536];
static pid_t children[4];
/* Shared memory for what is said between those that share nothing else. */
static volatile struct {
	int stage, answers[8];
	pid_t pid[4];
} *said;

static void prepare(void) { said = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)); }

static pid_t sharer(int number, int flags, int (*body)(void *))
{
	return children[number] = MUST(clone(body, stacks[number] + sizeof stacks[0], flags | SIGCHLD, NULL));
}

static void await_stage(int stage)
{
	while (said->stage < stage)
		usleep(1000);
}

/* The memory of both is one in some cases, where `exit` would run the handlers of the other. */
static int answer(bool right) { _exit(right ? 0 : 1); }

static const char *own_directory(char *buffer) { return getcwd(buffer, 256) ? buffer : "?"; }

/* --- Descriptors --- */

static int file_at_50(void *unused)
{
	(void)unused;
	await_stage(1);
	/* What the parent has opened after the restore is open here, and what is closed here is closed there. */
	bool right = fcntl(50, F_GETFD) >= 0 && lseek(50, 0, SEEK_CUR) == 3;
	close(51);
	return answer(right);
}

static void open_50(void)
{
	int fd = MUST(open("/tmp/shared", O_RDWR | O_CREAT, 0600));
	MUST(write(fd, "abc", 3));
	MUST(dup2(fd, 50));
	MUST(dup2(fd, 51));
	close(fd);
}

static void expect_closed_51(void)
{
	said->stage = 1;
	expect_exit(children[0], 0);
	CHECK(fcntl(51, F_GETFD) == -1 && errno == EBADF, "descriptor 51 is still open");
}

static void descriptors_setup(int more)
{
	prepare();
	sharer(0, CLONE_FILES | more, file_at_50);
}

static void descriptors_check(void)
{
	open_50();
	expect_closed_51();
}

static void unshare_descriptors(void) { MUST(unshare(CLONE_FILES)); }

static void shared_descriptors_setup(void) { descriptors_setup(0); }
static void shared_descriptors_check(void) { descriptors_check(); }
static void shared_descriptors_spoil(void) { unshare_descriptors(); }
STATE(shared_descriptors)

static void shared_descriptors_open_before_setup(void)
{
	descriptors_setup(0);
	open_50();
	MUST(fcntl(51, F_SETFD, FD_CLOEXEC));
}
static void shared_descriptors_open_before_check(void)
{
	CHECK(fcntl(51, F_GETFD) == FD_CLOEXEC, "descriptor 51 would stay open");
	expect_closed_51();
}
static void shared_descriptors_open_before_spoil(void) { unshare_descriptors(); }
STATE(shared_descriptors_open_before)

static void shared_descriptors_and_directory_setup(void) { descriptors_setup(CLONE_FS); }
static void shared_descriptors_and_directory_check(void) { descriptors_check(); }
static void shared_descriptors_and_directory_spoil(void) { unshare_descriptors(); }
STATE(shared_descriptors_and_directory)

static int lock_holder(void *unused)
{
	(void)unused;
	await_stage(1);
	struct flock lock = {.l_type = F_UNLCK, .l_whence = SEEK_SET, .l_len = 1};
	return answer(fcntl(50, F_SETLK, &lock) == 0);
}
/* A POSIX lock belongs to the table: each of them may give it up. */
static void shared_locks_setup(void)
{
	prepare();
	sharer(0, CLONE_FILES, lock_holder);
	open_50();
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
	MUST(fcntl(50, F_SETLK, &lock));
}
static int tries_lock(void)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
	int fd = MUST(open("/tmp/shared", O_RDWR));
	return fcntl(fd, F_SETLK, &lock) == 0;
}
static void shared_locks_check(void)
{
	expect_exit(in_child(tries_lock), 0);
	said->stage = 1;
	expect_exit(children[0], 0);
	expect_exit(in_child(tries_lock), 1);
}
static void shared_locks_spoil(void)
{
	struct flock lock = {.l_type = F_UNLCK, .l_whence = SEEK_SET, .l_len = 1};
	MUST(fcntl(50, F_SETLK, &lock));
}
STATE(shared_locks)

/* Two children that share with each other and not with their parent. */
static int waiting_sharer(void *unused)
{
	(void)unused;
	said->pid[1] = getpid();
	await_stage(2);
	bool right = fcntl(50, F_GETFD) >= 0;
	close(51);
	said->stage = 3;
	return answer(right);
}
static int first_sibling(void)
{
	MUST(clone(waiting_sharer, stacks[1] + sizeof stacks[1], CLONE_FILES | CLONE_PARENT | SIGCHLD, NULL));
	until_finishing();
	await_stage(1);
	open_50();
	said->stage = 2;
	await_stage(3);
	return fcntl(51, F_GETFD) == -1 ? 0 : 1;
}
static void shared_by_siblings_setup(void)
{
	prepare();
	children[0] = in_child(first_sibling);
	while (!said->pid[1])
		usleep(1000);
}
static void shared_by_siblings_check(void)
{
	CHECK(fcntl(50, F_GETFD) == -1, "descriptor 50 is open here");
	said->stage = 1;
	expect_exit(said->pid[1], 0);
	expect_exit(children[0], 0);
}
static void shared_by_siblings_spoil(void) { MUST(kill(said->pid[1], SIGKILL)); }
STATE(shared_by_siblings)

static int grandchild(void *unused)
{
	(void)unused;
	said->pid[1] = getpid();
	return file_at_50(NULL);
}
static int passes_on(void *unused)
{
	(void)unused;
	pid_t pid = clone(grandchild, stacks[1] + sizeof stacks[1], CLONE_FILES | SIGCHLD, NULL);
	int status;
	bool right = pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
	return answer(right);
}
static void shared_by_three_setup(void)
{
	prepare();
	sharer(0, CLONE_FILES, passes_on);
	while (!said->pid[1])
		usleep(1000);
}
static void shared_by_three_check(void) { descriptors_check(); }
static void shared_by_three_spoil(void) { unshare_descriptors(); }
STATE(shared_by_three)

static int leaves_sharer(void)
{
	MUST(clone(grandchild, stacks[1] + sizeof stacks[1], CLONE_FILES | SIGCHLD, NULL));
	while (!said->pid[1])
		usleep(1000);
	_exit(0);
}
static int middle_that_shares(void *unused)
{
	(void)unused;
	return leaves_sharer();
}
/* An orphan that shares with init. */
static void shared_with_orphan_setup(void)
{
	prepare();
	sharer(0, CLONE_FILES, middle_that_shares);
	expect_exit(children[0], 0);
	children[0] = said->pid[1];
}
static void shared_with_orphan_check(void) { descriptors_check(); }
static void shared_with_orphan_spoil(void) { unshare_descriptors(); }
STATE(shared_with_orphan)

/* --- Directories --- */

static int follows(void *unused)
{
	char buffer[256];
	(void)unused;
	await_stage(1);
	bool right = !strcmp(own_directory(buffer), "/var/tmp") && umask(027) == 011;
	return answer(right);
}
static void directory_setup(int more)
{
	prepare();
	MUST(chdir("/tmp"));
	umask(055);
	sharer(0, CLONE_FS | more, follows);
}
static void directory_check(void)
{
	char buffer[256];
	CHECK(!strcmp(own_directory(buffer), "/tmp"), "the working directory is %s", buffer);
	MUST(chdir("/var/tmp"));
	CHECK(umask(011) == 055, "the umask is another");
	said->stage = 1;
	expect_exit(children[0], 0);
	CHECK(umask(0) == 027, "the umask does not follow");
}
static void unshare_directory(void) { MUST(unshare(CLONE_FS)); }

static void shared_directory_setup(void) { directory_setup(0); }
static void shared_directory_check(void) { directory_check(); }
static void shared_directory_spoil(void) { unshare_directory(); }
STATE(shared_directory)

static void shared_directory_and_descriptors_setup(void) { directory_setup(CLONE_FILES); }
static void shared_directory_and_descriptors_check(void) { directory_check(); }
static void shared_directory_and_descriptors_spoil(void) { unshare_directory(); }
STATE(shared_directory_and_descriptors)

/* --- Memory --- */

static volatile int common;
static volatile int *later;

static int writes_memory(void *unused)
{
	(void)unused;
	until_finishing();
	while (common != 1)
		usleep(1000);
	bool right = later && *later == 77;
	common = 2;
	return answer(right);
}
static void memory_check(void)
{
	/* Mapped after the restore, and there for both. */
	later = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	*later = 77;
	common = 1;
	expect_exit(children[0], 0);
	CHECK(common == 2, "the memory is not shared");
}
static void memory_spoil(void)
{
	MUST(kill(children[0], SIGKILL));
}

#define SHARED_MEMORY(name, flags) \
	static void name##_setup(void) \
	{ \
		prepare(); \
		sharer(0, flags, writes_memory); \
	} \
	static void name##_check(void) { memory_check(); } \
	static void name##_spoil(void) { memory_spoil(); } \
	STATE(name)
SHARED_MEMORY(shared_memory, CLONE_VM)
SHARED_MEMORY(shared_memory_and_descriptors, CLONE_VM | CLONE_FILES)
SHARED_MEMORY(shared_memory_and_signals, SIGNALS_TOO)
SHARED_MEMORY(shared_everything, SIGNALS_TOO | CLONE_FILES | CLONE_FS | CLONE_IO)

static volatile int handled;

static void handler(int signal) { handled = signal; }

static int uses_handler(void *unused)
{
	(void)unused;
	until_finishing();
	while (common != 1)
		usleep(1000);
	raise(SIGUSR1);
	return answer(handled == SIGUSR1);
}
static void shared_signal_actions_setup(void)
{
	prepare();
	sharer(0, SIGNALS_TOO, uses_handler);
}
static void shared_signal_actions_check(void)
{
	signal(SIGUSR1, handler);
	common = 1;
	expect_exit(children[0], 0);
}
static void shared_signal_actions_spoil(void) { memory_spoil(); }
STATE(shared_signal_actions)

static int long_sleeper(void *unused)
{
	(void)unused;
	int64_t before = now_ns(CLOCK_MONOTONIC);
	struct timespec rest = {.tv_sec = 1, .tv_nsec = 500000000};
	nanosleep(&rest, NULL);
	int64_t slept = now_ns(CLOCK_MONOTONIC) - before;
	until_finishing();
	return answer(slept >= 1500000000 && slept < 20000000000);
}
static int short_sleeper(void *unused)
{
	(void)unused;
	int64_t before = now_ns(CLOCK_MONOTONIC);
	struct timespec rest = {.tv_nsec = 700000000};
	nanosleep(&rest, NULL);
	int64_t slept = now_ns(CLOCK_MONOTONIC) - before;
	until_finishing();
	return answer(slept >= 700000000 && slept < 20000000000);
}
/* Interrupted sleeps of both are kept apart, though their memory is one. */
static void shared_memory_asleep_setup(void)
{
	prepare();
	sharer(0, CLONE_VM, long_sleeper);
	sharer(1, CLONE_VM, short_sleeper);
	usleep(20000);
}
static void shared_memory_asleep_check(void)
{
	expect_exit(children[0], 0);
	expect_exit(children[1], 0);
}
static void shared_memory_asleep_spoil(void) { memory_spoil(); }
STATE(shared_memory_asleep)

static volatile int thread_saw;

static void *sees_memory(void *unused)
{
	(void)unused;
	while (common != 2)
		usleep(1000);
	thread_saw = 1;
	return NULL;
}
static void shared_memory_and_threads_setup(void)
{
	pthread_t thread;
	prepare();
	MUST(pthread_create(&thread, NULL, sees_memory, NULL) ? -1 : 0);
	sharer(0, CLONE_VM, writes_memory);
}
static void shared_memory_and_threads_check(void)
{
	memory_check();
	for (int i = 0; !thread_saw; i++) {
		CHECK(i < 5000, "the thread does not see it");
		usleep(1000);
	}
}
static void shared_memory_and_threads_spoil(void) { memory_spoil(); }
STATE(shared_memory_and_threads)

/* --- Threads with something of their own --- */

static volatile int thread_ready, thread_go;
static char thread_directory[256];
static volatile mode_t thread_umask;
static volatile int thread_has_file;
static pthread_t thread;

static void *apart(void *flags)
{
	MUST(unshare((int)(intptr_t)flags));
	if ((intptr_t)flags & CLONE_FS) {
		MUST(chdir("/var/tmp"));
		umask(071);
	}
	if ((intptr_t)flags & CLONE_FILES) {
		int fd = MUST(open("/bin", O_RDONLY | O_DIRECTORY));
		MUST(dup2(fd, 60));
		close(fd);
	}
	thread_ready = 1;
	while (!thread_go)
		usleep(1000);
	own_directory(thread_directory);
	thread_umask = umask(0);
	thread_has_file = fcntl(60, F_GETFD) >= 0;
	return NULL;
}
static void start_apart(intptr_t flags)
{
	MUST(chdir("/tmp"));
	umask(022);
	MUST(pthread_create(&thread, NULL, apart, (void *)flags) ? -1 : 0);
	while (!thread_ready)
		usleep(1000);
}
static void end_apart(void)
{
	thread_go = 1;
	pthread_join(thread, NULL);
}

static void thread_with_directory_setup(void) { start_apart(CLONE_FS); }
static void thread_with_directory_check(void)
{
	char buffer[256];
	end_apart();
	CHECK(!strcmp(thread_directory, "/var/tmp"), "the thread is in %s", thread_directory);
	CHECK(thread_umask == 071, "the thread's umask is %o", thread_umask);
	CHECK(!strcmp(own_directory(buffer), "/tmp"), "the process is in %s", buffer);
	CHECK(umask(0) == 022, "the umask is another");
}
static void thread_with_directory_spoil(void) { MUST(chdir("/")); }
STATE(thread_with_directory)

static void thread_with_descriptors_setup(void) { start_apart(CLONE_FILES); }
static void thread_with_descriptors_check(void)
{
	end_apart();
	CHECK(thread_has_file, "the thread's descriptor is gone");
	CHECK(fcntl(60, F_GETFD) == -1, "the process has the thread's descriptor");
}
static void thread_with_descriptors_spoil(void) { MUST(dup2(0, 60)); }
STATE(thread_with_descriptors, .refused = "descriptors of its own")
