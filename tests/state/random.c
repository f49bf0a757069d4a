/*
 * Random state: `state random SEED COUNT [SKIPPED,SKIPPED…]`.
 *
 * Each step does one thing that programs do, in one of the processes that earlier steps made. What a step draws depends on the
 * seed and its number alone, so leaving others out leaves it as it was: a failure is made smaller by leaving out steps. Whether a
 * step's calls succeed is of no interest; what counts is that what can be observed (observe.c) is the same afterwards.
 */
#include "state.h"

#include "observe.h"
#include "random.h"
#include "registers.h"

#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/membarrier.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <mqueue.h>
#include <grp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <termios.h>

#define PAGE 4096ul
#define PROCESSES_MAX 12

static uint64_t word;

/* SplitMix64 (Steele et al. 2014). */
static uint64_t draw(void)
{
	uint64_t x = word += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static unsigned below(unsigned bound) { return (unsigned)(draw() % bound); }
static bool chance(unsigned of_hundred) { return below(100) < of_hundred; }

/* What steps have made in this process, to be used by later ones; a forked process knows its parent's. */
static struct { char *at; size_t pages; } areas[256];
static unsigned areas_count;
static int files[512];
static unsigned files_count;
static unsigned self, processes = 1;
static pid_t children[PROCESSES_MAX];
static unsigned parent_of[PROCESSES_MAX];
static bool exists[PROCESSES_MAX] = {true};
static unsigned step_number;
/* Whether steps may make what a save refuses: a state that is refused says nothing about the rest of it. */
static bool tries_refused;

static void keep_area(void *at, size_t pages)
{
	if (at != MAP_FAILED && areas_count < 256) {
		areas[areas_count].at = at;
		areas[areas_count++].pages = pages;
	}
}

static void keep_file(int fd)
{
	if (fd < 0)
		return;
	if (files_count < 512)
		files[files_count++] = fd;
	if (chance(20))
		fcntl(fd, F_SETFD, FD_CLOEXEC);
}

static int some_file(void) { return files_count ? files[below(files_count)] : -1; }

static void scribble(char *at, size_t pages)
{
	/* Written from outside, which fails where the memory can't be written to. */
	int memory = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	uint64_t page[PAGE / 8];
	for (size_t i = 0; i < pages; i++) {
		if (chance(40))
			continue;
		for (size_t j = 0; j < PAGE / 8; j++)
			page[j] = draw();
		ssize_t ignored = pwrite(memory, page, PAGE, (off_t)(uintptr_t)(at + i * PAGE));
		(void)ignored;
	}
	close(memory);
}

static int some_protection(void)
{
	static const int all[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC};
	return all[below(5)];
}

static void map_anonymous(void)
{
	size_t pages = 1 + below(chance(10) ? 2000 : 40);
	int flags = MAP_ANONYMOUS | (chance(75) ? MAP_PRIVATE : MAP_SHARED) | (chance(10) ? MAP_NORESERVE : 0);
	char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (at == MAP_FAILED)
		return;
	scribble(at, pages);
	if (chance(50))
		mprotect(at, pages * PAGE, some_protection());
	keep_area(at, pages);
}

static void change_area(void)
{
	if (!areas_count)
		return;
	unsigned which = below(areas_count);
	char *at = areas[which].at;
	size_t pages = areas[which].pages, first = below((unsigned)pages), count = 1 + below((unsigned)(pages - first));
	char *from = at + first * PAGE;
	static const int advice[] = {MADV_DONTNEED, MADV_DONTNEED, MADV_DONTFORK, MADV_DONTDUMP, MADV_SEQUENTIAL, MADV_RANDOM, MADV_HUGEPAGE,
		MADV_NOHUGEPAGE, MADV_WIPEONFORK, MADV_NORMAL, MADV_MERGEABLE, 102 /* MADV_GUARD_INSTALL */};
	switch (below(7)) {
	case 0:
		/* What lies there later may be somebody else's. */
		areas[which] = areas[--areas_count];
		munmap(from, count * PAGE);
		break;
	case 1: mprotect(from, count * PAGE, some_protection()); break;
	case 2: case 3: madvise(from, count * PAGE, advice[below(12)]); break;
	case 4: scribble(from, count); break;
	case 5: syscall(SYS_mlock2, from, count * PAGE, below(2)); break;
	case 6: {
		size_t larger = count + below(20);
		areas[which] = areas[--areas_count];
		char *moved = mremap(from, count * PAGE, larger * PAGE, MREMAP_MAYMOVE);
		if (moved != MAP_FAILED)
			keep_area(moved, larger);
		break;
	}
	}
}

static void reserve(void) { keep_area(mmap(NULL, 1ul << (24 + below(14)), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), 64); }

static void open_file(void)
{
	char path[64], bytes[3000];
	static const char *const folders[] = {"/tmp", "/dev/shm", "/var/tmp", "/"};
	unsigned folder = below(4);
	snprintf(path, sizeof path, "%s/random-%u", folders[folder], step_number);
	static const int flags[] = {O_RDWR, O_RDWR | O_APPEND, O_WRONLY, O_RDWR | O_SYNC, O_RDWR | O_NONBLOCK, O_RDWR | O_NOATIME};
	int fd = open(path, O_CREAT | flags[below(6)], 0600 + below(64));
	for (size_t i = 0; i < sizeof bytes; i++)
		bytes[i] = (char)draw();
	for (unsigned i = below(6); i > 0; i--) {
		if (chance(20))
			lseek(fd, below(1 << 20), SEEK_CUR);
		ssize_t ignored = write(fd, bytes, below(sizeof bytes));
		(void)ignored;
	}
	lseek(fd, below(5000), SEEK_SET);
	if (chance(30)) {
		int sharing = chance(50) ? MAP_PRIVATE : MAP_SHARED;
		off_t from = chance(30) ? (off_t)PAGE : 0;
		struct stat now;
		/* What is written behind the end of a file on a disk is gone when the kernel writes it back. */
		if (sharing == MAP_SHARED && folder != 1 && fstat(fd, &now) == 0 && ftruncate(fd, (now.st_size + PAGE - 1) / PAGE * PAGE))
			sharing = MAP_PRIVATE;
		keep_area(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, sharing, fd, from), 1);
	}
	if (chance(25))
		unlink(path);
	else if (chance(20)) {
		char other[80];
		snprintf(other, sizeof other, "%s-moved", path);
		rename(path, other);
	}
	if (chance(30))
		flock(fd, LOCK_NB | (chance(50) ? LOCK_SH : LOCK_EX));
	if (chance(30)) {
		struct flock lock = {.l_type = (short)(chance(50) ? F_RDLCK : F_WRLCK), .l_start = below(1000), .l_len = below(1000)};
		fcntl(fd, chance(50) ? F_SETLK : F_OFD_SETLK, &lock);
	}
	keep_file(fd);
}

static void open_directory(void)
{
	static const char *const paths[] = {"/", "/tmp", "/proc/self", "/dev", "/dev/null", "/dev/zero", "/etc/passwd", "/proc/self/status", "/sys/kernel"};
	keep_file(open(paths[below(9)], O_RDONLY | (chance(20) ? O_PATH : 0)));
}

static void duplicate(void)
{
	int fd = some_file();
	if (fd < 0)
		return;
	keep_file(chance(50) ? dup(fd) : fcntl(fd, F_DUPFD, 10 + below(900)));
}

static void close_one(void)
{
	if (!files_count)
		return;
	unsigned which = below(files_count);
	close(files[which]);
	files[which] = files[--files_count];
}

static void make_pipe(void)
{
	int ends[2];
	char bytes[4096];
	if (pipe2(ends, (chance(30) ? O_NONBLOCK : 0) | (chance(20) ? O_DIRECT : 0)))
		return;
	if (chance(30))
		fcntl(ends[1], F_SETPIPE_SZ, 4096 << below(6));
	fcntl(ends[1], F_SETFL, fcntl(ends[1], F_GETFL) | O_NONBLOCK);
	for (unsigned i = below(10); i > 0; i--) {
		memset(bytes, (int)draw(), sizeof bytes);
		ssize_t ignored = write(ends[1], bytes, 1 + below(sizeof bytes));
		(void)ignored;
	}
	for (unsigned i = 0; i < 2; i++)
		if (chance(15))
			close(ends[i]);
		else
			keep_file(ends[i]);
}

static void make_pair(void)
{
	static const int kinds[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
	int ends[2], kind = kinds[below(3)];
	char bytes[5000];
	if (socketpair(AF_UNIX, kind | (chance(30) ? SOCK_NONBLOCK : 0), 0, ends))
		return;
	for (unsigned i = below(8); i > 0; i--) {
		memset(bytes, (int)draw(), sizeof bytes);
		send(ends[below(2)], bytes, 1 + below(sizeof bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
	}
	if (chance(20))
		shutdown(ends[below(2)], (int)below(3));
	for (unsigned i = 0; i < 2; i++)
		if (chance(10))
			close(ends[i]);
		else
			keep_file(ends[i]);
}

static void named_socket(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	socklen_t length = sizeof address;
	if (chance(50))
		snprintf(address.sun_path, sizeof address.sun_path, "/tmp/socket-%u", step_number);
	else
		length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 +
			(size_t)snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "abstract-%u", step_number));
	int kind = chance(60) ? SOCK_STREAM : SOCK_DGRAM, server = socket(AF_UNIX, kind, 0);
	if (bind(server, (struct sockaddr *)&address, length) == 0) {
		if (kind == SOCK_STREAM)
			listen(server, 5);
		for (unsigned i = below(3); i > 0; i--) {
			int client = socket(AF_UNIX, kind, 0);
			bool connected = connect(client, (struct sockaddr *)&address, length) == 0;
			if (connected)
				send(client, "greetings", 1 + below(9), MSG_DONTWAIT | MSG_NOSIGNAL);
			keep_file(client);
			/* Data in a connection that nobody has accepted are refused. */
			if (connected && kind == SOCK_STREAM && (chance(60) || !tries_refused))
				keep_file(accept(server, NULL, NULL));
		}
	}
	keep_file(server);
}

static void internet_socket(void)
{
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	struct sockaddr_storage address = {0};
	bool sixth = chance(30);
	socklen_t length = sixth ? sizeof v6 : sizeof v4;
	memcpy(&address, sixth ? (void *)&v6 : (void *)&v4, length);
	int kind = chance(60) ? SOCK_STREAM : SOCK_DGRAM, family = address.ss_family, server = socket(family, kind, 0), on = 1;
	char bytes[20000];
	memset(bytes, (int)draw(), sizeof bytes);
	if (chance(30))
		setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(server, (struct sockaddr *)&address, length) == 0) {
		getsockname(server, (struct sockaddr *)&address, &length);
		if (kind == SOCK_STREAM)
			listen(server, 5);
		for (unsigned i = below(3); i > 0; i--) {
			int client = socket(family, kind, 0);
			bool connected = connect(client, (struct sockaddr *)&address, length) == 0;
			if (connected)
				send(client, bytes, 1 + below(kind == SOCK_STREAM ? sizeof bytes : 1000), MSG_DONTWAIT | MSG_NOSIGNAL);
			keep_file(client);
			if (connected && kind == SOCK_STREAM) {
				int peer = accept(server, NULL, NULL);
				send(peer, bytes, below(sizeof bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
				if (chance(20))
					shutdown(chance(50) ? peer : client, SHUT_WR);
				keep_file(peer);
			}
		}
	}
	keep_file(server);
}

static void event_file(void)
{
	switch (below(7)) {
	case 0: keep_file(eventfd(below(1000), (int)below(2))); break;
	case 1: {
		int fd = timerfd_create(chance(50) ? CLOCK_MONOTONIC : CLOCK_BOOTTIME, 0);
		struct itimerspec when = {.it_value.tv_sec = chance(80) ? 3600 + below(1000) : 0, .it_interval.tv_sec = below(100)};
		timerfd_settime(fd, 0, &when, NULL);
		keep_file(fd);
		break;
	}
	case 2: {
		sigset_t set;
		sigemptyset(&set);
		sigaddset(&set, 34 + (int)below(20));
		keep_file(signalfd(-1, &set, (int)(chance(50) ? SFD_NONBLOCK : 0)));
		break;
	}
	case 3: {
		int fd = epoll_create1(0);
		for (unsigned i = below(4); i > 0; i--) {
			struct epoll_event event = {.events = EPOLLIN | (chance(30) ? EPOLLET : 0) | (chance(20) ? EPOLLONESHOT : 0), .data.u64 = draw()};
			epoll_ctl(fd, EPOLL_CTL_ADD, some_file(), &event);
		}
		keep_file(fd);
		break;
	}
	case 4: {
		int fd = inotify_init1(0);
		/* Other steps make files there, and events that nobody has read are refused. */
		inotify_add_watch(fd, tries_refused ? "/var/tmp" : "/proc", IN_CREATE | IN_DELETE);
		if (chance(50))
			inotify_add_watch(fd, "/etc", IN_MODIFY);
		keep_file(fd);
		break;
	}
	case 5: {
		int fd = memfd_create("random", MFD_ALLOW_SEALING);
		char bytes[4096];
		memset(bytes, (int)draw(), sizeof bytes);
		ssize_t ignored = write(fd, bytes, 1 + below(sizeof bytes));
		(void)ignored;
		if (chance(40))
			keep_area(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0), 1);
		if (chance(40))
			fcntl(fd, F_ADD_SEALS, (int)below(16));
		keep_file(fd);
		break;
	}
	case 6: keep_file((int)syscall(SYS_pidfd_open, chance(50) ? getpid() : getppid(), 0)); break;
	}
}

static void send_rights(void)
{
	int ends[2], sent = some_file(), kind = chance(50) ? SOCK_STREAM : SOCK_DGRAM;
	if (sent < 0 || socketpair(AF_UNIX, kind, 0, ends))
		return;
	union { struct cmsghdr header; char space[CMSG_SPACE(2 * sizeof(int))]; } control = {0};
	struct iovec part = {.iov_base = "rights", .iov_len = 1 + below(6)};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(2 * sizeof(int))};
	control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(2 * sizeof(int))};
	int both[2] = {sent, some_file()};
	memcpy(CMSG_DATA(&control.header), both, sizeof both);
	sendmsg(ends[0], &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	for (unsigned i = 0; i < 2; i++)
		if (chance(20))
			close(ends[i]);
		else
			keep_file(ends[i]);
}

static void make_fifo(void)
{
	char path[64], bytes[4096];
	snprintf(path, sizeof path, "/tmp/fifo-%u", step_number);
	mkfifo(path, 0600 + below(64));
	int fd = open(path, O_RDWR | O_NONBLOCK);
	memset(bytes, (int)draw(), sizeof bytes);
	ssize_t ignored = write(fd, bytes, below(sizeof bytes));
	(void)ignored;
	if (chance(50))
		keep_file(open(path, O_RDONLY | O_NONBLOCK));
	if (chance(30))
		unlink(path);
	keep_file(fd);
}

static void temporary_file(void)
{
	char bytes[5000];
	int fd = open("/tmp", O_TMPFILE | O_RDWR | (chance(30) ? O_APPEND : 0), 0600);
	memset(bytes, (int)draw(), sizeof bytes);
	lseek(fd, below(1 << 22), SEEK_SET);
	ssize_t ignored = write(fd, bytes, below(sizeof bytes));
	(void)ignored;
	keep_file(fd);
}

static void posix_queue(void)
{
	char name[64], bytes[200];
	snprintf(name, sizeof name, "/random-%u", step_number);
	struct mq_attr limits = {.mq_maxmsg = 1 + below(8), .mq_msgsize = (long)sizeof bytes};
	int fd = mq_open(name, O_CREAT | O_RDWR | O_NONBLOCK, 0600, &limits);
	memset(bytes, (int)draw(), sizeof bytes);
	for (unsigned i = below(6); i > 0; i--)
		mq_send(fd, bytes, below(sizeof bytes), below(5));
	if (chance(30))
		mq_unlink(name);
	keep_file(fd);
}

static void make_terminal(void)
{
	char bytes[100];
	struct termios settings;
	int master = posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK), unlocked = 0, number;
	if (master < 0 || ioctl(master, TIOCSPTLCK, &unlocked) || ioctl(master, TIOCGPTN, &number))
		return;
	snprintf(bytes, sizeof bytes, "/dev/pts/%d", number);
	int slave = open(bytes, O_RDWR | O_NOCTTY | O_NONBLOCK);
	tcgetattr(slave, &settings);
	if (chance(50))
		cfmakeraw(&settings);
	settings.c_cc[VEOL] = (cc_t)below(32);
	tcsetattr(slave, TCSANOW, &settings);
	struct winsize size = {.ws_row = (unsigned short)below(100), .ws_col = (unsigned short)below(200)};
	ioctl(slave, TIOCSWINSZ, &size);
	/* Letters, and now and then the end of a line. */
	for (size_t i = 0; i < sizeof bytes; i++)
		bytes[i] = chance(10) ? '\n' : (char)('a' + below(26));
	ssize_t ignored = write(chance(50) ? master : slave, bytes, below(sizeof bytes));
	(void)ignored;
	keep_file(master);
	if (chance(80))
		keep_file(slave);
	else
		close(slave);
}

static void datagrams(void)
{
	struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	socklen_t length = sizeof address;
	char bytes[1000];
	int server = socket(AF_INET6, SOCK_DGRAM, 0), client = socket(AF_INET6, SOCK_DGRAM, 0);
	memset(bytes, (int)draw(), sizeof bytes);
	if (bind(server, (struct sockaddr *)&address, sizeof address) == 0 && getsockname(server, (struct sockaddr *)&address, &length) == 0) {
		for (unsigned i = below(6); i > 0; i--)
			sendto(client, bytes, below(sizeof bytes), MSG_DONTWAIT, (struct sockaddr *)&address, length);
		if (chance(40))
			connect(client, (struct sockaddr *)&address, length);
	}
	keep_file(server);
	keep_file(client);
}

static void routes(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = below(4)};
	int fd = socket(AF_NETLINK, SOCK_RAW, (int[]){NETLINK_ROUTE, NETLINK_KOBJECT_UEVENT}[below(2)]);
	bind(fd, (struct sockaddr *)&address, sizeof address);
	keep_file(fd);
}

/* Only what no later step and no look needs. */
static void credentials(void)
{
	static const int unneeded[] = {CAP_MKNOD, CAP_AUDIT_WRITE, CAP_NET_RAW, CAP_SETFCAP, CAP_NET_BIND_SERVICE};
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct sets[2];
	int one = unneeded[below(5)];
	switch (below(5)) {
	case 0: prctl(PR_CAPBSET_DROP, one); break;
	case 1:
		syscall(SYS_capget, &header, sets);
		sets[one / 32].effective &= ~(1u << one % 32);
		if (chance(50))
			sets[one / 32].permitted &= ~(1u << one % 32);
		if (chance(50))
			sets[one / 32].inheritable |= sets[one / 32].permitted & 1u << one % 32;
		syscall(SYS_capset, &header, sets);
		break;
	case 2: prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, one, 0, 0); break;
	case 3: {
		gid_t groups[5];
		for (size_t i = 0; i < 5; i++)
			groups[i] = below(70000);
		setgroups(below(6), groups);
		break;
	}
	case 4: prctl(PR_SET_SECUREBITS, below(4) << 2); break;
	}
}

/* One call that nobody makes fails from now on. */
static void filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_acct, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | below(100)),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = 4, .filter = code};
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, chance(50) ? SECCOMP_FILTER_FLAG_TSYNC : 0, &program);
}

static void announce_barriers(void)
{
	static const int commands[] = {MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED,
		MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE};
	syscall(SYS_membarrier, commands[below(3)], 0, 0);
}

static void nothing(int signal) { (void)signal; }

static void signals(void)
{
	int number = 34 + (int)below(20);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, number);
	struct sigaction action = {.sa_handler = chance(30) ? SIG_IGN : nothing,
		.sa_flags = (int)((chance(30) ? SA_RESTART : 0) | (chance(30) ? SA_NODEFER : 0))};
	sigfillset(&action.sa_mask);
	switch (below(5)) {
	case 0:
		sigprocmask(SIG_BLOCK, &set, NULL);
		for (unsigned i = 1 + below(5); i > 0; i--)
			sigqueue(getpid(), number, (union sigval){.sival_int = (int)draw()});
		break;
	case 1: sigaction(number, &action, NULL); break;
	case 2: sigaction(chance(50) ? SIGUSR1 : SIGWINCH, &action, NULL); break;
	case 3: {
		static char stack[2][32768];
		stack_t wanted = {.ss_sp = stack[below(2)], .ss_size = 8192 + below(16384)};
		sigaltstack(&wanted, NULL);
		break;
	}
	case 4: {
		/* One that waits would end the process. */
		struct sigaction now;
		sigaction(number, NULL, &now);
		if (now.sa_handler != SIG_DFL)
			sigprocmask(SIG_UNBLOCK, &set, NULL);
		break;
	}
	}
}

static void timers(void)
{
	if (chance(30)) {
		struct itimerval timer = {.it_value.tv_sec = 3600, .it_interval.tv_sec = below(100)};
		setitimer((int)below(3), &timer, NULL);
		return;
	}
	struct sigevent event = {.sigev_notify = chance(50) ? SIGEV_SIGNAL : SIGEV_NONE, .sigev_signo = 34 + (int)below(20),
		.sigev_value.sival_int = (int)draw()};
	int id;
	syscall(SYS_timer_create, chance(50) ? CLOCK_MONOTONIC : CLOCK_REALTIME, &event, &id);
	struct itimerspec when = {.it_value.tv_sec = 3600 + below(1000), .it_interval.tv_sec = below(100)};
	if (chance(70))
		syscall(SYS_timer_settime, id, 0, &when, NULL);
	else if (chance(40))
		syscall(SYS_timer_delete, id);
}

static void attributes(void)
{
	char name[16];
	switch (below(12)) {
	case 0: umask(below(0777)); break;
	case 1: setpriority(PRIO_PROCESS, 0, (int)below(19)); break;
	case 2: {
		struct rlimit limit;
		int which = (int[]){RLIMIT_CORE, RLIMIT_NPROC, RLIMIT_STACK, RLIMIT_SIGPENDING, RLIMIT_MSGQUEUE, RLIMIT_NOFILE}[below(6)];
		if (getrlimit((__rlimit_resource_t)which, &limit) == 0) {
			if (limit.rlim_cur > 1000)
				limit.rlim_cur = limit.rlim_cur / 2 + below(100);
			setrlimit((__rlimit_resource_t)which, &limit);
		}
		break;
	}
	case 3: { int ignored = chdir((const char *[]){"/tmp", "/", "/proc", "/dev/shm"}[below(4)]); (void)ignored; break; }
	case 4:
		snprintf(name, sizeof name, "name-%u", below(1000));
		prctl(PR_SET_NAME, name);
		break;
	case 5: { struct sched_param parameters = {0}; sched_setscheduler(0, chance(50) ? SCHED_BATCH : SCHED_IDLE, &parameters); break; }
	case 6: prctl(PR_SET_TIMERSLACK, 1 + below(100000)); break;
	case 7: prctl(PR_SET_PDEATHSIG, (int)below(3) * 10); break;
	case 8: prctl(PR_SET_CHILD_SUBREAPER, below(2)); break;
	case 9: prctl(PR_SET_THP_DISABLE, below(2), 0, 0, 0); break;
	case 10: { cpu_set_t set; CPU_ZERO(&set); CPU_SET(below(2), &set); sched_setaffinity(0, sizeof set, &set); break; }
	case 11: prctl(PR_SET_DUMPABLE, below(2)); break;
	}
}

static void *thread_body(void *argument)
{
	uintptr_t kind = (uintptr_t)argument;
	char name[16];
	snprintf(name, sizeof name, "thread-%u", (unsigned)(kind >> 8) % 1000);
	prctl(PR_SET_NAME, name);
	int word_of_ours = 0;
	for (;;)
		switch (kind % 4) {
		case 0: { struct timespec step = {.tv_nsec = 10000000}; nanosleep(&step, NULL); break; }
		case 1: syscall(SYS_futex, &word_of_ours, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0); break;
		case 2: poll(NULL, 0, 100); break;
		case 3: pause(); break;
		}
	return NULL;
}

static void make_thread(void)
{
	pthread_t thread;
	/* It must never be the one that a signal of a later step finds unblocked. */
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_create(&thread, NULL, thread_body, (void *)(uintptr_t)draw());
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void hold_registers(void)
{
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	registers_hold(draw());
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void system_v(void)
{
	key_t key = 0x5a0000 + (key_t)step_number;
	switch (below(3)) {
	case 0: {
		size_t pages = 1 + below(10);
		int id = shmget(key, pages * PAGE, IPC_CREAT | 0600);
		char *at = shmat(id, NULL, chance(20) ? SHM_RDONLY : 0);
		if (at != (char *)-1) {
			scribble(at, pages);
			keep_area(at, pages);
		}
		if (chance(30))
			shmctl(id, IPC_RMID, NULL);
		break;
	}
	case 1: {
		int id = semget(key, 1 + (int)below(5), IPC_CREAT | 0600);
		struct sembuf operation = {.sem_op = (short)below(50)};
		semop(id, &operation, 1);
		break;
	}
	case 2: {
		int id = msgget(key, IPC_CREAT | 0600);
		struct { long type; char text[100]; } message = {.type = 1 + (long)below(5)};
		memset(message.text, (int)draw(), sizeof message.text);
		for (unsigned i = below(5); i > 0; i--)
			msgsnd(id, &message, below(100), IPC_NOWAIT);
		break;
	}
	}
}

static void group(void)
{
	switch (below(3)) {
	case 0: setsid(); break;
	case 1: setpgid(0, 0); break;
	case 2: setpgid(0, getppid()); break;
	}
}

static void leave_zombie(void)
{
	int status = (int)below(256);
	if (fork() == 0)
		_exit(status);
}

typedef void action(void);
static action *const actions[] = {map_anonymous, map_anonymous, change_area, change_area, change_area, change_area, reserve, open_file, open_file,
	open_file, open_directory, duplicate, duplicate, close_one, make_pipe, make_pair, named_socket, internet_socket, event_file, event_file,
	signals, signals, timers, attributes, attributes, make_thread, system_v, group, leave_zombie, send_rights, make_fifo, temporary_file,
	posix_queue, make_terminal, datagrams, routes, credentials, filter, announce_barriers, hold_registers};

static void mark(const char *what, unsigned process)
{
	char path[64];
	snprintf(path, sizeof path, "/%s-%u", what, process);
	/* The file itself is no state of anybody's. */
	mode_t before = umask(0);
	int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
	umask(before);
	CHECK(fd != -1, "%s can't be made", path);
	close(fd);
}

static void wait_for(const char *what, unsigned process)
{
	char path[64];
	snprintf(path, sizeof path, "/%s-%u", what, process);
	while (access(path, F_OK)) {
		struct timespec step = {.tv_nsec = 2000000};
		nanosleep(&step, NULL);
	}
}

static void wait_for_all(const char *what)
{
	for (unsigned process = 0; process < processes; process++)
		if (exists[process])
			wait_for(what, process);
}

static bool skipped(const char *list, unsigned number)
{
	while (list && *list) {
		char *end;
		if (strtoul(list, &end, 10) == number)
			return true;
		list = *end ? end + 1 : NULL;
	}
	return false;
}

int random_state(uint64_t seed, unsigned count, const char *skip)
{
	observe_begin();
	tries_refused = seed % 4 == 0;
	for (unsigned step = 0; step < count; step++) {
		word = seed ^ (uint64_t)step << 32;
		draw();
		step_number = step;
		/* Drawn by all processes alike, so that all know which process each step is for. */
		bool makes_process = chance(4) && processes < PROCESSES_MAX;
		unsigned owner = below(processes);
		bool left_out = skipped(skip, step);
		if (makes_process) {
			/* One that is left out keeps its number, and so do its steps, which nobody does. */
			unsigned child = processes++;
			exists[child] = exists[owner] && !left_out;
			parent_of[child] = owner;
			if (!exists[child])
				continue;
			if (owner == self) {
				pid_t pid = MUST(fork());
				if (pid == 0) {
					self = child;
					/* Some were not inherited, and what lies there later is somebody else's. */
					areas_count = 0;
					/* Threads are not inherited. */
					registers_forget();
				} else
					children[child] = pid;
			}
		} else if (owner == self && !left_out) {
			action *what = actions[below(sizeof actions / sizeof *actions)];
			what();
		}
	}
	/* What is shared may be changed by any of them. */
	mark("done", self);
	wait_for_all("done");
	/* What was sent over loopback arrives a little later where the machine is busy. */
	struct timespec settle = {.tv_nsec = 300000000};
	nanosleep(&settle, NULL);
	observe_before();
	mark("stands", self);
	wait_for_all("stands");
	if (self == 0)
		MUST(write(1, "ready\n", 6));
	until_finishing();
	observe_after();
	registers_compare();
	mark("checked", self);
	wait_for_all("checked");
	for (unsigned child = 1; child < processes; child++)
		if (exists[child] && parent_of[child] == self)
			expect_exit(children[child], 0);
	if (self == 0)
		MUST(write(1, "OK\n", 3));
	_exit(0);
}
