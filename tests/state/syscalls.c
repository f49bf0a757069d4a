/* Threads that are saved inside of system calls. */
#include "state.h"

#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/uio.h>

/*
 * A child makes one call and exits with 0 if it returned what it has to. The parent lets it return after the restore, by
 * writing to a pipe, unless the call ends by itself.
 */
static pid_t child;
static int pipes[2];
static void begin(int (*body)(void)) { child = in_child(body); usleep(60000); }
#define CALL(id, prepare, let) \
	static void id##_setup(void) { prepare; begin(id##_body); } \
	static void id##_check(void) { usleep(20000); CHECK(waitpid(child, NULL, WNOHANG) == 0, "the call has ended too early"); let; expect_exit(child, 0); } \
	static void id##_spoil(void) { MUST(kill(child, SIGKILL)); usleep(50000); } \
	STATE(id)

static int in_read_body(void) { char bytes[8]; return read(pipes[0], bytes, 8) == 3 && !memcmp(bytes, "abc", 3) ? 0 : 1; }
CALL(in_read, MUST(pipe(pipes)), MUST(write(pipes[1], "abc", 3)))

/* More than a pipe holds: a part has been written. */
static char large[200000];
static int in_write_body(void)
{
	memset(large, 'w', sizeof large);
	/* A stop lets a write that has written a part return that part, as the kernel does for every signal (pipe(7)). */
	for (size_t done = 0; done < sizeof large;) {
		ssize_t count = write(pipes[1], large + done, sizeof large - done);
		if (count <= 0)
			return 1;
		done += (size_t)count;
	}
	return 0;
}
static void drain(size_t bytes)
{
	static char got[200000];
	for (size_t done = 0; done < bytes;) {
		ssize_t count = MUST(read(pipes[0], got + done, bytes - done));
		CHECK(count > 0, "the pipe ends after %zu", done);
		for (ssize_t i = 0; i < count; i++)
			CHECK(got[done + (size_t)i] == 'w', "other content at %zu", done);
		done += (size_t)count;
	}
}
static void in_write_setup(void) { MUST(pipe(pipes)); begin(in_write_body); close(pipes[1]); }
static void in_write_check(void)
{
	drain(65536);
	/* Nothing may be written twice. */
	int status;
	drain(sizeof large - 65536);
	MUST(waitpid(child, &status, 0));
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a write has failed");
}
static void in_write_spoil(void) { MUST(kill(child, SIGKILL)); }
STATE(in_write)

static int in_readv_body(void)
{
	char one[2], two[2];
	struct iovec parts[2] = {{one, 2}, {two, 2}};
	return readv(pipes[0], parts, 2) == 3 && one[0] == 'a' && two[0] == 'c' ? 0 : 1;
}
CALL(in_readv, MUST(pipe(pipes)), MUST(write(pipes[1], "abc", 3)))

/* All or nothing: a part has come before. */
static int in_receive_all_body(void)
{
	char bytes[6];
	return recv(pipes[0], bytes, 6, MSG_WAITALL) == 6 && !memcmp(bytes, "abcdef", 6) ? 0 : 1;
}
static void in_receive_all_setup(void)
{
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pipes));
	begin(in_receive_all_body);
}
static void in_receive_all_check(void)
{
	MUST(write(pipes[1], "abc", 3));
	usleep(20000);
	CHECK(waitpid(child, NULL, WNOHANG) == 0, "the call has ended too early");
	MUST(write(pipes[1], "def", 3));
	expect_exit(child, 0);
}
static void in_receive_all_spoil(void) { MUST(write(pipes[1], "x", 1)); }
STATE(in_receive_all)

/* Some messages have come before, and the call returns these: the kernel tells the next call why it was interrupted. */
static int in_receive_many_body(void)
{
	char bytes[3];
	struct iovec parts[3] = {{bytes, 1}, {bytes + 1, 1}, {bytes + 2, 1}};
	struct mmsghdr messages[3] = {{.msg_hdr = {.msg_iov = parts, .msg_iovlen = 1}},
		{.msg_hdr = {.msg_iov = parts + 1, .msg_iovlen = 1}}, {.msg_hdr = {.msg_iov = parts + 2, .msg_iovlen = 1}}};
	for (int have = 0; have < 3;) {
		int more = recvmmsg(pipes[0], messages + have, (unsigned)(3 - have), 0, NULL);
		if (more <= 0)
			return 1;
		have += more;
	}
	return memcmp(bytes, "abc", 3) ? 2 : 0;
}
static void in_receive_many_setup(void)
{
	MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, pipes));
	MUST(write(pipes[1], "a", 1));
	begin(in_receive_many_body);
}
static void in_receive_many_check(void)
{
	MUST(write(pipes[1], "b", 1));
	usleep(20000);
	CHECK(waitpid(child, NULL, WNOHANG) == 0, "the call has ended too early");
	MUST(write(pipes[1], "c", 1));
	expect_exit(child, 0);
}
static void in_receive_many_spoil(void) { MUST(write(pipes[1], "x", 1)); }
STATE(in_receive_many)

/* Waits with a mask of their own: a blocked signal ends them, and is blocked again behind. */
static volatile sig_atomic_t count;
static void counting(int signal) { (void)signal; count++; }
static sigset_t open_mask;
static void block_user_signal(void)
{
	struct sigaction action = {.sa_handler = counting, .sa_flags = SA_RESTART};
	sigset_t set;
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	sigemptyset(&open_mask);
}
static int ended_by_signal(long result)
{
	sigset_t now;
	if (result != -1 || errno != EINTR || count != 1)
		return 1;
	sigprocmask(SIG_BLOCK, NULL, &now);
	return sigismember(&now, SIGUSR1) ? 0 : 2;
}
static int in_ppoll_body(void) { block_user_signal(); return ended_by_signal(ppoll(NULL, 0, NULL, &open_mask)); }
CALL(in_ppoll, , MUST(kill(child, SIGUSR1)))
static int in_pselect_body(void) { block_user_signal(); return ended_by_signal(pselect(0, NULL, NULL, NULL, NULL, &open_mask)); }
CALL(in_pselect, , MUST(kill(child, SIGUSR1)))
static int in_epoll_pwait_body(void)
{
	struct epoll_event event;
	int poller = MUST(epoll_create1(0));
	block_user_signal();
	return ended_by_signal(epoll_pwait(poller, &event, 1, -1, &open_mask));
}
CALL(in_epoll_pwait, , MUST(kill(child, SIGUSR1)))

static int in_poll_body(void) { struct pollfd wait = {pipes[0], POLLIN, 0}; return poll(&wait, 1, -1) == 1 && wait.revents == POLLIN ? 0 : 1; }
CALL(in_poll, MUST(pipe(pipes)), MUST(write(pipes[1], "a", 1)))
static int in_select_body(void)
{
	fd_set set;
	FD_ZERO(&set);
	FD_SET(pipes[0], &set);
	return select(pipes[0] + 1, &set, NULL, NULL, NULL) == 1 && FD_ISSET(pipes[0], &set) ? 0 : 1;
}
CALL(in_select, MUST(pipe(pipes)), MUST(write(pipes[1], "a", 1)))

/* Sleeps that end at their time, not before and not for ever. */
static int64_t began;
static int slept(int64_t ns) { return now_ns(CLOCK_MONOTONIC) - began >= ns ? 0 : 1; }
#define SLEEP(id, ...) \
	static int id##_body(void) { began = now_ns(CLOCK_MONOTONIC); __VA_ARGS__ } \
	static void id##_setup(void) { begin(id##_body); } \
	static void id##_check(void) { expect_exit(child, 0); } \
	static void id##_spoil(void) { kill(child, SIGKILL); int status; waitpid(child, &status, 0); } \
	STATE(id)
SLEEP(sleep_relative, struct timespec t = {1, 500000000}; if (nanosleep(&t, NULL)) return 2; return slept(1500000000);)
SLEEP(sleep_with_rest, struct timespec t = {1, 500000000}; struct timespec rest = {7, 8}; if (nanosleep(&t, &rest)) return 2; return slept(1500000000);)
SLEEP(sleep_in_place, struct timespec t = {1, 500000000}; if (nanosleep(&t, &t)) return 2; return slept(1500000000);)
SLEEP(sleep_until, struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); t.tv_sec += 2; if (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL)) return 2; return slept(2000000000);)
SLEEP(sleep_boot_time, struct timespec t = {1, 500000000}; if (clock_nanosleep(CLOCK_BOOTTIME, 0, &t, NULL)) return 2; return slept(1500000000);)
SLEEP(sleep_by_poll, if (poll(NULL, 0, 1500)) return 2; return slept(1500000000);)
SLEEP(sleep_by_select, struct timeval t = {1, 500000}; if (select(0, NULL, NULL, NULL, &t)) return 2; return slept(1500000000);)
SLEEP(sleep_by_ppoll, struct timespec t = {1, 500000000}; if (ppoll(NULL, 0, &t, NULL)) return 2; return slept(1500000000);)
SLEEP(sleep_by_futex, int word = 1; struct timespec t = {1, 500000000}; if (syscall(SYS_futex, &word, FUTEX_WAIT, 1, &t, NULL, 0) != -1 || errno != ETIMEDOUT) return 2; return slept(1500000000);)
SLEEP(sleep_by_futex_until, int word = 1; struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); t.tv_sec += 2; if (syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 1, &t, NULL, -1) != -1 || errno != ETIMEDOUT) return 2; return slept(2000000000);)
SLEEP(sleep_by_signal_wait, sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR1); struct timespec t = {1, 500000000}; if (sigtimedwait(&s, NULL, &t) != -1 || errno != EAGAIN) return 2; return slept(1500000000);)
SLEEP(sleep_by_epoll, struct epoll_event e; int p = epoll_create1(0); if (epoll_wait(p, &e, 1, 1500)) return 2; return slept(1500000000);)

/* A sleep of processor time while another thread works. */
static void *work(void *data) { (void)data; for (;;) ; return NULL; }
static int sleep_of_work_body(void)
{
	pthread_t worker;
	struct timespec t = {0, 400000000};
	int64_t first = now_ns(CLOCK_PROCESS_CPUTIME_ID);
	if (pthread_create(&worker, NULL, work, NULL))
		return 3;
	int failed = clock_nanosleep(CLOCK_PROCESS_CPUTIME_ID, 0, &t, NULL);
	int64_t worked = now_ns(CLOCK_PROCESS_CPUTIME_ID) - first;
	/* The count begins anew in another container. */
	_exit(failed ? 2 : worked >= 300000000 || worked < 0 ? 0 : 1);
}
static void sleep_of_work_setup(void) { begin(sleep_of_work_body); }
static void sleep_of_work_check(void) { expect_exit(child, 0); }
static void sleep_of_work_spoil(void) { kill(child, SIGKILL); int status; waitpid(child, &status, 0); }
STATE(sleep_of_work)

/* Waits for locks. */
static int lock_file;
static int in_flock_body(void) { int own = open("/tmp/in-flock", O_RDWR); return flock(own, LOCK_EX) == 0 ? 0 : 1; }
CALL(in_flock, (lock_file = MUST(open("/tmp/in-flock", O_RDWR | O_CREAT, 0600)), MUST(flock(lock_file, LOCK_EX))), MUST(flock(lock_file, LOCK_UN)))
static int in_file_lock_body(void) { struct flock lock = {.l_type = F_WRLCK}; int own = open("/tmp/in-lock", O_RDWR); return fcntl(own, F_SETLKW, &lock) == 0 ? 0 : 1; }
static struct flock whole = {.l_type = F_WRLCK};
CALL(in_file_lock, (lock_file = MUST(open("/tmp/in-lock", O_RDWR | O_CREAT, 0600)), MUST(fcntl(lock_file, F_SETLK, &whole))), (whole.l_type = F_UNLCK, MUST(fcntl(lock_file, F_SETLK, &whole))))

/* Waits for children. */
static int grandchild(void) { char byte; return read(pipes[0], &byte, 1) == 1 ? 9 : 1; }
static int in_wait_body(void)
{
	int status;
	pid_t own = fork();
	if (own == 0)
		_exit(grandchild());
	return waitpid(own, &status, 0) == own && WEXITSTATUS(status) == 9 ? 0 : 1;
}
CALL(in_wait, MUST(pipe(pipes)), MUST(write(pipes[1], "a", 1)))
static int in_waitid_body(void)
{
	siginfo_t info;
	pid_t own = fork();
	if (own == 0)
		_exit(grandchild());
	return waitid(P_ALL, 0, &info, WEXITED) == 0 && info.si_pid == own && info.si_status == 9 ? 0 : 1;
}
CALL(in_waitid, MUST(pipe(pipes)), MUST(write(pipes[1], "a", 1)))

/* Futexes between processes. */
static int *word;
static int in_futex_body(void)
{
	while (__atomic_load_n(word, __ATOMIC_SEQ_CST) == 0)
		if (syscall(SYS_futex, word, FUTEX_WAIT, 0, NULL, NULL, 0) == -1 && errno != EAGAIN)
			return 1;
	return 0;
}
static void share_word(void)
{
	word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(word != MAP_FAILED, "no shared memory");
}
static void wake_word(void) { *word = 1; MUST(syscall(SYS_futex, word, FUTEX_WAKE, 10, NULL, NULL, 0)); }
CALL(in_futex, share_word(), wake_word())

static pthread_mutex_t *mutex;
static int in_inheriting_lock_body(void) { return pthread_mutex_lock(mutex) == 0 && pthread_mutex_unlock(mutex) == 0 ? 0 : 1; }
static void share_mutex(void)
{
	pthread_mutexattr_t attributes;
	share_word();
	mutex = (pthread_mutex_t *)word;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(mutex, &attributes);
	CHECK(pthread_mutex_lock(mutex) == 0, "it can't be locked");
}
CALL(in_inheriting_lock, share_mutex(), CHECK(pthread_mutex_unlock(mutex) == 0, "it can't be unlocked"))

/* A counter that is empty. */
static int counter;
static int in_counter_body(void) { uint64_t value; return read(counter, &value, 8) == 8 && value == 5 ? 0 : 1; }
static void add_five(void) { uint64_t five = 5; MUST(write(counter, &five, 8)); }
CALL(in_counter, counter = MUST(eventfd(0, 0)), add_five())

/* Data that is passed on by the kernel. */
static int other[2];
static int in_splice_body(void) { return splice(pipes[0], NULL, other[1], NULL, 100, 0) == 3 ? 0 : 1; }
static void spliced(void)
{
	char bytes[4];
	MUST(write(pipes[1], "abc", 3));
	CHECK(read(other[0], bytes, 4) == 3 && !memcmp(bytes, "abc", 3), "other data came");
}
CALL(in_splice, (MUST(pipe(pipes)), MUST(pipe(other))), spliced())

/* Messages and semaphores. */
static int queue;
struct message { long kind; char text[8]; };
static int in_message_body(void) { struct message got; return msgrcv(queue, &got, 8, 4, 0) == 3 && !memcmp(got.text, "abc", 3) ? 0 : 1; }
static void send_message(void) { struct message sent = {4, "abc"}; MUST(msgsnd(queue, &sent, 3, 0)); }
CALL(in_message, queue = MUST(msgget(IPC_PRIVATE, 0600)), send_message())
static int in_semaphore_body(void) { struct sembuf take = {0, -2, 0}; return semop(queue, &take, 1) == 0 ? 0 : 1; }
static void give(void) { struct sembuf two = {0, 2, 0}; MUST(semop(queue, &two, 1)); }
CALL(in_semaphore, queue = MUST(semget(IPC_PRIVATE, 1, 0600)), give())
