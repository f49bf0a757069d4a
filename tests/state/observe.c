/*
 * What a process can see of itself, as text: mappings with their content, descriptors with what is queued in them, signals,
 * timers, limits, credentials, threads, children. Two such texts, before and after, must be equal.
 *
 * Looking must not change what is seen, so memory comes from one mapping that is left out, files are read by plain calls, and a
 * descriptor that is opened is closed before the next look. Left out is what differs from host to host or moves by itself:
 * device and inode numbers (two that were equal stay equal), processor time, times of files, resident sizes.
 */
#include "state.h"

#include "observe.h"

#include <stddef.h>
#include <asm/prctl.h>
#include <dirent.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <termios.h>

/* Newer than the headers of some systems. */
#ifndef PR_GET_MDWE
#define PR_GET_MDWE 66
#endif
#ifndef PR_GET_MEMORY_MERGE
#define PR_GET_MEMORY_MERGE 68
#endif
#define BARRIER_REGISTRATIONS (1 << 9) /* MEMBARRIER_CMD_GET_REGISTRATIONS */
#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#endif

/* A mapping, or neighbours that differ in nothing. */
struct map {
	unsigned long start, end, offset;
	uint64_t sum;
	char protection[8], name[4200], flags[256];
};

/* Everything of this file's own that changes lies here. */
struct room {
	char texts[2][OBSERVED_BYTES];
	size_t length;
	char *text;
	struct map map, last;
	char file[1 << 20];
	char bytes[256 << 10];
	char entries[64 << 10];
	/* Inode numbers in the order in which they are seen first. */
	uint64_t inodes[4096];
	uint64_t watches;
	const char *kind;
	size_t inodes_count;
};

static struct room *room;

void observe_begin(void)
{
	/* With a distance all around, so that it never becomes one mapping with what is looked at. */
	size_t size = (sizeof *room + 4095) / 4096 * 4096;
	char *around = mmap(NULL, size + 2 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(around != MAP_FAILED, "no memory to look from");
	room = (struct room *)(around + 4096);
	MUST(mprotect(room, size, PROT_READ | PROT_WRITE));
	memset(room, 1, sizeof *room);
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(room->text + room->length, OBSERVED_BYTES - room->length, format, arguments);
	va_end(arguments);
	CHECK(length >= 0 && room->length + (size_t)length < OBSERVED_BYTES, "more to see than there is room");
	room->length += (size_t)length;
}

/* A file of /proc, or NULL. In room->file until the next call. */
static char *slurp(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd == -1)
		return NULL;
	size_t filled = 0;
	ssize_t count;
	while ((count = read(fd, room->file + filled, sizeof room->file - 1 - filled)) > 0)
		filled += (size_t)count;
	close(fd);
	room->file[filled] = 0;
	return room->file;
}

static uint64_t hash(uint64_t seed, const void *data, size_t length)
{
	/* FNV-1a by words: fast enough for some tens of megabytes. */
	const unsigned char *at = data;
	for (; length >= 8; at += 8, length -= 8) {
		uint64_t word;
		memcpy(&word, at, 8);
		seed = (seed ^ word) * 0x100000001b3u;
		seed ^= seed >> 29;
	}
	while (length--)
		seed = (seed ^ *at++) * 0x100000001b3u;
	return seed;
}

static size_t inode_number(uint64_t inode)
{
	for (size_t i = 0; i < room->inodes_count; i++)
		if (room->inodes[i] == inode)
			return i;
	CHECK(room->inodes_count < 4096, "too many inodes");
	room->inodes[room->inodes_count] = inode;
	return room->inodes_count++;
}

/* Calls `each` with the lines of `text`, which it cuts. */
static void lines(char *text, void (*each)(char *line))
{
	for (char *line = text; line && *line;) {
		char *end = strchr(line, '\n');
		if (end)
			*end++ = 0;
		each(line);
		line = end;
	}
}

static bool begins(const char *text, const char *with) { return strncmp(text, with, strlen(with)) == 0; }

/* The stack below us changes as we look, and what can't be read may be larger than any machine. */
static uint64_t content_sum(uint64_t sum, const struct map *map)
{
	bool own = map->start <= (unsigned long)room && (unsigned long)room < map->end;
	if (own || !strcmp(map->name, "[stack]") || begins(map->name, "[v") || begins(map->protection, "---"))
		return sum;
	int memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	for (unsigned long at = map->start; at < map->end; at += 4096) {
		ssize_t count = pread(memory, room->bytes, 4096, (off_t)at);
		sum = count == 4096 ? hash(sum, room->bytes, 4096) : hash(sum, "hole", 4);
	}
	close(memory);
	return sum;
}

/* Says what was remembered of a mapping. */
static void finish_map(void)
{
	struct map *last = &room->last;
	if (last->end)
		say("map %lx-%lx %s %lx %s content %016lx\n  flags%s\n", last->start, last->end, last->protection, last->offset, last->name,
			(unsigned long)last->sum, last->flags);
	last->end = 0;
}

static void one_map(char *line)
{
	unsigned long start, end, offset, inode;
	char protection[8], device[16];
	int name_at = 0;
	if (sscanf(line, "%lx-%lx %7s %lx %15s %lu %n", &start, &end, protection, &offset, device, &inode, &name_at) == 6) {
		char *name = line + name_at;
		char *last = strrchr(name, '/');
		if (last && strstr(name, " (deleted)"))
			last[1] = 0;
		struct map *now = &room->map;
		now->start = start;
		now->end = end;
		now->offset = offset;
		snprintf(now->protection, sizeof now->protection, "%s", protection);
		snprintf(now->name, sizeof now->name, "%s", name);
	} else if (begins(line, "VmFlags:")) {
		/* `sd` and `uw` are for trackers, `ac` follows from what has been paid for, and `gu` says that there may once have been guard pages. */
		struct map *now = &room->map, *last = &room->last;
		size_t length = 0;
		char *save = NULL;
		now->flags[0] = 0;
		for (char *flag = strtok_r(line + 8, " ", &save); flag; flag = strtok_r(NULL, " ", &save))
			if (strcmp(flag, "sd") && strcmp(flag, "uw") && strcmp(flag, "ac") && strcmp(flag, "gu") && length + 4 < sizeof now->flags)
				length += (size_t)sprintf(now->flags + length, " %s", flag);
		/* The kernel may keep neighbours apart that could be one, or not: that is no difference. */
		bool follows = last->end == now->start && !strcmp(last->name, now->name) &&
			(!*now->name || now->offset == last->offset + (last->end - last->start));
		if (follows && !strcmp(last->protection, now->protection) && !strcmp(last->flags, now->flags)) {
			last->end = now->end;
		} else {
			finish_map();
			*last = *now;
			last->sum = 0xcbf29ce484222325u;
		}
		last->sum = content_sum(last->sum, now);
	}
}

static void one_status(char *line)
{
	static const char *const wanted[] = {"Name:", "Umask:", "Tgid:", "Pid:", "PPid:", "TracerPid:", "Uid:", "Gid:", "Groups:",
		"NSpid:", "NSpgid:", "NSsid:", "Kthread:", "CoreDumping:", "THP_enabled:", "untag_mask:", "Threads:", "SigPnd:",
		"ShdPnd:", "SigBlk:", "SigIgn:", "SigCgt:", "Cap", "NoNewPrivs:", "Seccomp", "Speculation", "Cpus_allowed:", "Mems_allowed:"};
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		if (begins(line, wanted[i]))
			say("status %s\n", line);
}

static void one_limit(char *line) { say("limit %s\n", line); }

static void one_timer(char *line)
{
	int id;
	say("timer %s\n", line);
	if (sscanf(line, "ID: %d", &id) == 1) {
		struct itimerspec timer;
		if (syscall(SYS_timer_gettime, id, &timer) == 0)
			say("  every %ld.%09ld armed %d\n", (long)timer.it_interval.tv_sec, timer.it_interval.tv_nsec,
				timer.it_value.tv_sec || timer.it_value.tv_nsec);
	}
}

/* The last columns are times, and who was last is told of living processes only. */
static void one_object(char *line)
{
	int kind = room->kind[1], columns = kind == 'e' ? 8 : 11, column = 0;
	say("%s", room->kind);
	for (char *save = NULL, *word = strtok_r(line, " ", &save); word && column < columns; word = strtok_r(NULL, " ", &save), column++)
		if (!(kind == 'h' && (column == 4 || column == 5)) && !(kind == 's' && (column == 5 || column == 6)))
			say(" %s", word);
	say("\n");
}

static void one_info(char *line)
{
	if (begins(line, "mnt_id:") || begins(line, "ino:") || begins(line, "eventfd-id:") || begins(line, "it_value:") || begins(line, "ticks:"))
		return;
	unsigned tfd, events;
	unsigned long long data;
	if (sscanf(line, "tfd: %u events: %x data: %llx", &tfd, &events, &data) == 3) {
		/* In an order of the kernel's own. */
		unsigned long long watch[3] = {tfd, events, data};
		room->watches += hash(1, watch, sizeof watch);
	} else if (begins(line, "inotify ")) {
		unsigned wd, mask;
		char *at = strstr(line, "mask:");
		if (sscanf(line, "inotify wd:%x", &wd) == 1 && at && sscanf(at, "mask:%x", &mask) == 1)
			say("    inotify %u %x\n", wd, mask);
	} else if (begins(line, "lock:")) {
		/* Number, kind, mode, type, pid, device:inode, range: the device is another one, and so may the number be. */
		char kind[16], advisory[16], type[16], place[64], start[32], end[32];
		int number, pid;
		if (sscanf(line, "lock: %d: %15s %15s %15s %d %63s %31s %31s", &number, kind, advisory, type, &pid, place, start, end) == 8)
			say("    lock %s %s %s %s %s\n", kind, advisory, type, start, end);
	} else {
		say("    %s\n", line);
	}
}

static void one_option(int fd, int level, int name)
{
	unsigned char value[64];
	socklen_t length = sizeof value;
	if (getsockopt(fd, level, name, value, &length))
		return;
	say("    option %d %d is", level, name);
	for (socklen_t i = 0; i < length; i++)
		say(" %02x", value[i]);
	say("\n");
}

static void one_address(const char *what, int result, const struct sockaddr_storage *address, socklen_t length)
{
	if (result) {
		say("    %s error %d\n", what, errno);
		return;
	}
	say("    %s", what);
	for (socklen_t i = 0; i < length; i++)
		say(" %02x", ((const unsigned char *)address)[i]);
	say("\n");
}

static void one_socket(int fd)
{
	struct sockaddr_storage address;
	socklen_t length = sizeof address;
	memset(&address, 0, sizeof address);
	int result = getsockname(fd, (struct sockaddr *)&address, &length);
	one_address("name", result, &address, length);
	length = sizeof address;
	memset(&address, 0, sizeof address);
	result = getpeername(fd, (struct sockaddr *)&address, &length);
	one_address("peer", result, &address, length);
	static const int general[] = {SO_TYPE, SO_DOMAIN, SO_PROTOCOL, SO_ACCEPTCONN, SO_REUSEADDR, SO_REUSEPORT, SO_KEEPALIVE, SO_BROADCAST,
		SO_LINGER, SO_OOBINLINE, SO_SNDBUF, SO_RCVBUF, SO_RCVLOWAT, SO_RCVTIMEO, SO_SNDTIMEO, SO_PASSCRED, SO_PRIORITY, SO_TIMESTAMP};
	for (size_t i = 0; i < sizeof general / sizeof *general; i++)
		one_option(fd, SOL_SOCKET, general[i]);
	static const int tcp[] = {TCP_NODELAY, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT, TCP_CONGESTION};
	for (size_t i = 0; i < sizeof tcp / sizeof *tcp; i++)
		one_option(fd, IPPROTO_TCP, tcp[i]);
	one_option(fd, IPPROTO_IP, IP_TOS);
	one_option(fd, IPPROTO_IP, IP_TTL);
	one_option(fd, IPPROTO_IPV6, IPV6_V6ONLY);
	/* The first message, or what a stream holds. */
	ssize_t count = recv(fd, room->bytes, sizeof room->bytes, MSG_PEEK | MSG_DONTWAIT);
	/* An error that waits is told once. */
	if (count == -1 && errno != EAGAIN)
		count = recv(fd, room->bytes, sizeof room->bytes, MSG_PEEK | MSG_DONTWAIT);
	say("    queue %zd %016lx\n", count, count > 0 ? (unsigned long)hash(1, room->bytes, (size_t)count) : 0ul);
}

/* Looks into a pipe without taking anything out. */
static void one_pipe(int fd, int flags)
{
	int queued = 0;
	ioctl(fd, FIONREAD, &queued);
	say("    capacity %d queued %d", fcntl(fd, F_GETPIPE_SZ), queued);
	int copy[2];
	if (queued > 0 && (flags & O_ACCMODE) != O_WRONLY && pipe2(copy, O_CLOEXEC | O_NONBLOCK) == 0) {
		fcntl(copy[1], F_SETPIPE_SZ, fcntl(fd, F_GETPIPE_SZ));
		ssize_t count = tee(fd, copy[1], (size_t)queued, SPLICE_F_NONBLOCK);
		uint64_t sum = 1;
		for (ssize_t got; count > 0 && (got = read(copy[0], room->bytes, sizeof room->bytes)) > 0; count -= got)
			sum = hash(sum, room->bytes, (size_t)got);
		say(" %016lx", (unsigned long)sum);
		close(copy[0]);
		close(copy[1]);
	}
	say("\n");
}

static void one_terminal(int fd)
{
	struct termios settings;
	struct winsize size;
	int session = -1, foreground = -1, queued = -1;
	/* The library leaves some of it as it was. */
	memset(&settings, 0, sizeof settings);
	if (tcgetattr(fd, &settings))
		return;
	ioctl(fd, TIOCGWINSZ, &size);
	ioctl(fd, TIOCGSID, &session);
	ioctl(fd, TIOCGPGRP, &foreground);
	ioctl(fd, FIONREAD, &queued);
	say("    terminal %016lx %ux%u session %d foreground %d queued %d\n", (unsigned long)hash(1, &settings, sizeof settings), size.ws_col,
		size.ws_row, session, foreground, queued);
}

static void one_descriptor(int fd)
{
	char path[64], target[4200];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	ssize_t length = readlink(path, target, sizeof target - 1);
	struct stat stat;
	if (length < 0 || fstat(fd, &stat))
		return;
	target[length] = 0;
	/* What is shown for a file without a name may be another name. */
	if (stat.st_nlink == 0 && strrchr(target, '/'))
		strrchr(target, '/')[1] = 0;
	/* `socket:[123]` and `pipe:[123]`. */
	char *number = strchr(target, ':');
	if (number && number[1] == '[')
		number[1] = 0;
	int flags = fcntl(fd, F_GETFL);
	/* The standard streams are the engine's. */
	if (fd <= 2)
		return;
	say("fd %d %s object %zu flags %o %d mode %o owner %u %u links %lu\n", fd, target, inode_number(stat.st_ino ^ stat.st_dev << 40), flags,
		fcntl(fd, F_GETFD), stat.st_mode, stat.st_uid, stat.st_gid, (unsigned long)stat.st_nlink);
	struct f_owner_ex owner = {0};
	if (fcntl(fd, F_GETOWN_EX, &owner) == 0 && owner.pid)
		say("    owner %d %d signal %d\n", owner.type, owner.pid, fcntl(fd, F_GETSIG));
	int seals = fcntl(fd, F_GET_SEALS);
	if (seals != -1)
		say("    seals %x\n", seals);
	if (S_ISREG(stat.st_mode)) {
		say("    size %ld", (long)stat.st_size);
		if ((flags & O_ACCMODE) != O_WRONLY && !(flags & (O_PATH | O_DIRECT)) && !begins(target, "/proc") && !begins(target, "/sys")) {
			uint64_t sum = 1;
			ssize_t count;
			for (off_t at = 0; (count = pread(fd, room->bytes, sizeof room->bytes, at)) > 0; at += count)
				sum = hash(sum, room->bytes, (size_t)count);
			say(" %016lx", (unsigned long)sum);
		}
		say("\n");
	}
	struct mq_attr queue;
	if (S_ISREG(stat.st_mode) && mq_getattr(fd, &queue) == 0)
		say("    messages %ld of %ld, %ld bytes each\n", queue.mq_curmsgs, queue.mq_maxmsg, queue.mq_msgsize);
	if (S_ISCHR(stat.st_mode) && !(flags & O_PATH))
		one_terminal(fd);
	if (S_ISSOCK(stat.st_mode))
		one_socket(fd);
	if (S_ISFIFO(stat.st_mode))
		one_pipe(fd, flags);
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	char *info = slurp(path);
	room->watches = 0;
	if (info)
		lines(info, one_info);
	say("    watches %016lx\n", (unsigned long)room->watches);
}

/* Calls `each` with the numbers that a folder of /proc has as names, ascending. The folder's own descriptor is closed by then. */
static void numbers(const char *folder, void (*each)(int number))
{
	int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CHECK(fd != -1, "%s can't be opened", folder);
	static const size_t most = 1024;
	int found[1024];
	size_t count = 0;
	long length;
	while ((length = syscall(SYS_getdents64, fd, room->entries, sizeof room->entries)) > 0)
		for (long at = 0; at < length;) {
			struct dirent64 *entry = (struct dirent64 *)(room->entries + at);
			at += entry->d_reclen;
			if (entry->d_name[0] != '.' && count < most && atoi(entry->d_name) != (strstr(folder, "/fd") ? fd : -1))
				found[count++] = atoi(entry->d_name);
		}
	close(fd);
	for (size_t i = 1; i < count; i++)
		for (size_t j = i; j > 0 && found[j - 1] > found[j]; j--) {
			int swap = found[j];
			found[j] = found[j - 1];
			found[j - 1] = swap;
		}
	for (size_t i = 0; i < count; i++)
		each(found[i]);
}

static void one_thread(int tid)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/task/%d/status", tid);
	say("thread %d\n", tid);
	char *status = slurp(path);
	if (status)
		lines(status, one_status);
	struct sched_param parameters = {0};
	cpu_set_t set;
	CPU_ZERO(&set);
	int policy = sched_getscheduler(tid);
	sched_getparam(tid, &parameters);
	sched_getaffinity(tid, sizeof set, &set);
	say("  policy %d priority %d nice %d processors %d io %ld\n", policy, parameters.sched_priority, getpriority(PRIO_PROCESS, (id_t)tid),
		CPU_COUNT(&set), syscall(SYS_ioprio_get, 1, tid));
	snprintf(path, sizeof path, "/proc/self/task/%d/children", tid);
	char *children = slurp(path);
	if (children)
		say("  children %s\n", children);
}

static void say_link(const char *name)
{
	char path[64], target[4200];
	snprintf(path, sizeof path, "/proc/self/%s", name);
	ssize_t length = readlink(path, target, sizeof target - 1);
	say("%s %.*s\n", name, (int)(length > 0 ? length : 0), target);
}

static void say_file(const char *name)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/self/%s", name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd == -1 ? -1 : read(fd, room->file, sizeof room->file);
	if (fd != -1)
		close(fd);
	say("%s %zd %016lx\n", name, length, length > 0 ? (unsigned long)hash(1, room->file, (size_t)length) : 0ul);
}

static void look(int which)
{
	room->text = room->texts[which];
	room->length = 0;
	room->inodes_count = 0;
	room->last.end = 0;
	/* Which lies in memory that is looked at. */
	errno = 0;
	char *text = slurp("/proc/self/smaps");
	/* One line is cut off at a time, and room->file is used by nobody else meanwhile: one_map opens memory, not files. */
	lines(text, one_map);
	finish_map();
	say("break %p\n", sbrk(0));
	numbers("/proc/self/fd", one_descriptor);
	numbers("/proc/self/task", one_thread);
	struct kernel_action { unsigned long handler, flags, restorer, mask; } action;
	for (int signal = 1; signal <= 64; signal++)
		if (syscall(SYS_rt_sigaction, signal, NULL, &action, 8) == 0 && (action.handler || action.flags))
			say("signal %d %lx %lx %lx %lx\n", signal, action.handler, action.flags, action.restorer, action.mask);
	stack_t stack;
	sigaltstack(NULL, &stack);
	say("altstack %p %x %zu\n", stack.ss_sp, (unsigned)stack.ss_flags, stack.ss_size);
	for (int which_timer = 0; which_timer < 3; which_timer++) {
		struct itimerval timer;
		getitimer(which_timer, &timer);
		say("itimer %d %ld.%06ld armed %d\n", which_timer, timer.it_interval.tv_sec, timer.it_interval.tv_usec,
			timer.it_value.tv_sec || timer.it_value.tv_usec);
	}
	char *timers = slurp("/proc/self/timers");
	if (timers)
		lines(timers, one_timer);
	lines(slurp("/proc/self/limits"), one_limit);
	static const char *const links[] = {"exe", "cwd", "root"};
	for (size_t i = 0; i < 3; i++)
		say_link(links[i]);
	static const char *const files[] = {"cmdline", "environ", "auxv", "comm", "oom_score_adj", "personality", "coredump_filter", "timerslack_ns", "loginuid"};
	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		say_file(files[i]);
	static const int properties[] = {PR_GET_DUMPABLE, PR_GET_KEEPCAPS, PR_GET_SECUREBITS, PR_GET_NO_NEW_PRIVS, PR_GET_THP_DISABLE,
		PR_GET_TIMERSLACK, PR_GET_IO_FLUSHER, PR_GET_MDWE, PR_GET_MEMORY_MERGE, PR_MCE_KILL_GET};
	for (size_t i = 0; i < sizeof properties / sizeof *properties; i++)
		say("prctl %d %d\n", properties[i], prctl(properties[i], 0, 0, 0, 0));
	int value = 0;
	prctl(PR_GET_CHILD_SUBREAPER, &value);
	say("subreaper %d\n", value);
	value = 0;
	prctl(PR_GET_TSC, &value);
	say("time stamps %d\n", value);
	unsigned long base = 0;
	syscall(SYS_arch_prctl, ARCH_GET_GS, &base);
	say("gs %lx\n", base);
	say("barriers %ld\n", syscall(SYS_membarrier, BARRIER_REGISTRATIONS, 0, 0));
	value = 0;
	prctl(PR_GET_PDEATHSIG, &value);
	say("pdeathsig %d\n", value);
	void *address = NULL;
	prctl(PR_GET_TID_ADDRESS, &address);
	say("tid address %p\n", address);
	void *head;
	size_t length;
	syscall(SYS_get_robust_list, 0, &head, &length);
	say("robust list %p %zu\n", head, length);
	static const char *const objects[] = {"shm", "sem", "msg"};
	for (size_t i = 0; i < 3; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/sysvipc/%s", objects[i]);
		room->kind = objects[i];
		char *all = slurp(path);
		if (all)
			lines(all, one_object);
	}
	say("ids %d %d %d %d\n", getpid(), getppid(), getpgrp(), getsid(0));
}

void observe_before(void) { look(0); }

void observe_after(void)
{
	look(1);
	char *before = room->texts[0], *after = room->texts[1];
	for (;;) {
		char *before_end = strchrnul(before, '\n'), *after_end = strchrnul(after, '\n');
		if (before_end - before != after_end - after || memcmp(before, after, (size_t)(before_end - before)))
			fail("was `%.*s`, is `%.*s`", (int)(before_end - before < 400 ? before_end - before : 400), before,
				(int)(after_end - after < 400 ? after_end - after : 400), after);
		if (!*before_end)
			break;
		before = before_end + 1;
		after = after_end + 1;
	}
}
