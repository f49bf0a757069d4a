/* Files of /proc and /sys, namespaces, devices, and directories that are being read. */
#include "state.h"

#include <dirent.h>
#include <sys/syscall.h>

static int fds[16];

static void proc_self_setup(void)
{
	static const char *const paths[] = {
		"/proc/self/status", "/proc/self/maps", "/proc/self/stat", "/proc/self/cmdline", "/proc/self/mem", "/proc/stat",
		"/proc/meminfo", "/proc/self/mountinfo", "/proc/sys/kernel/osrelease", "/proc/self/task", "/proc/self/fd", "/proc/self",
		"/proc/self/pagemap", "/proc/1/environ",
	};
	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
		fds[i] = MUST(open(paths[i], O_RDONLY));
	char text[10];
	MUST(read(fds[3], text, 5));
}
static volatile int proc_self_value = 0x5a5a1234;
static void proc_self_check(void)
{
	char text[8192], pid[32];
	snprintf(pid, sizeof pid, "Pid:\t%d\n", getpid());
	ssize_t count = MUST(pread(fds[0], text, sizeof text - 1, 0));
	text[count] = 0;
	CHECK(strstr(text, pid), "status is another process's");
	CHECK(pread(fds[1], text, 64, 0) > 0 && strchr(text, '-'), "maps");
	count = MUST(read(fds[3], text, sizeof text));
	CHECK(count > 5 && !memcmp(text, "state", 5), "cmdline goes on with %.*s", (int)count, text);
	int value = 0;
	CHECK(pread(fds[4], &value, sizeof value, (off_t)(uintptr_t)&proc_self_value) == sizeof value && value == proc_self_value, "mem");
	CHECK(read(fds[5], text, 3) == 3 && !memcmp(text, "cpu", 3), "stat");
	CHECK(read(fds[6], text, 8) == 8 && !memcmp(text, "MemTotal", 8), "meminfo");
	CHECK(read(fds[7], text, sizeof text) > 0 && read(fds[8], text, sizeof text) > 0, "mountinfo or osrelease");
	snprintf(text, sizeof text, "%d", getpid());
	MUST(faccessat(fds[9], text, F_OK, 0));
	MUST(faccessat(fds[10], "1", F_OK, 0));
	CHECK(readlinkat(fds[11], "exe", text, sizeof text) > 0, "the directory of the process");
	CHECK(pread(fds[12], &value, 4, 0) >= 0 || errno != EBADF, "pagemap");
}
static void proc_self_spoil(void) { MUST(dup2(fds[6], fds[0])); }
STATE(proc_self)

static pid_t proc_child;
static int proc_child_body(void) { until_finishing(); return 0; }
static void proc_others_setup(void)
{
	char path[64];
	proc_child = in_child(proc_child_body);
	static const char *const names[] = {"status", "", "task", "mem"};
	for (int i = 0; i < 4; i++) {
		snprintf(path, sizeof path, "/proc/%d/%s", proc_child, names[i]);
		fds[i] = MUST(open(path, O_RDONLY));
	}
}
static void proc_others_check(void)
{
	char text[2048], pid[32];
	snprintf(pid, sizeof pid, "Pid:\t%d\n", proc_child);
	expect_exit(proc_child, 0);
	CHECK(pread(fds[0], text, sizeof text, 0) == -1 && errno == ESRCH, "status is readable after the end of the process");
	CHECK(openat(fds[1], "status", O_RDONLY) == -1 && (errno == ESRCH || errno == ENOENT), "the directory is another process's");
}
static void proc_others_spoil(void) { MUST(dup2(MUST(open("/proc/self/status", O_RDONLY)), fds[0])); }
STATE(proc_others)

static int proc_ended_body(void) { return 0; }
static void proc_ended_setup(void)
{
	char path[64];
	pid_t child = MUST(fork());
	if (child == 0) {
		pause();
		_exit(0);
	}
	snprintf(path, sizeof path, "/proc/%d/status", child);
	fds[0] = MUST(open(path, O_RDONLY));
	snprintf(path, sizeof path, "/proc/%d", child);
	fds[1] = MUST(open(path, O_RDONLY | O_DIRECTORY));
	fds[2] = MUST(open(path, O_PATH));
	MUST(kill(child, SIGKILL));
	MUST(waitpid(child, NULL, 0));
	/* Its zombie stays. */
	proc_child = in_child(proc_ended_body);
	siginfo_t ended;
	MUST(waitid(P_PID, (id_t)proc_child, &ended, WEXITED | WNOWAIT));
	snprintf(path, sizeof path, "/proc/%d/status", proc_child);
	fds[3] = MUST(open(path, O_RDONLY));
}
static void proc_ended_check(void)
{
	char text[2048];
	CHECK(read(fds[0], text, sizeof text) == -1 && errno == ESRCH, "the ended process has a status");
	CHECK(openat(fds[1], "status", O_RDONLY) == -1, "the ended process has a directory");
	CHECK(openat(fds[2], "status", O_RDONLY) == -1, "the ended process has a directory");
	ssize_t count = MUST(read(fds[3], text, sizeof text - 1));
	text[count] = 0;
	CHECK(strstr(text, "Z (zombie)"), "the zombie's status: %s", text);
	expect_exit(proc_child, 0);
	CHECK(waitpid(-1, text == NULL ? NULL : (int *)(void *)text, WNOHANG) == -1 && errno == ECHILD, "there is another child");
}
static void proc_ended_spoil(void) { MUST(dup2(fds[3], fds[0])); }
STATE(proc_ended)

static char ended_cwd[64];
static void cwd_of_ended_setup(void)
{
	char path[64];
	pid_t child = MUST(fork());
	if (child == 0) {
		pause();
		_exit(0);
	}
	snprintf(path, sizeof path, "/proc/%d/task", child);
	MUST(chdir(path));
	/* It works elsewhere, and stays there. */
	proc_child = MUST(fork());
	if (proc_child == 0) {
		MUST(chdir(".."));
		until_finishing();
		_exit(access("status", F_OK) == -1 && !getcwd(path, sizeof path) && errno == ENOENT ? 0 : 1);
	}
	usleep(100000);
	MUST(kill(child, SIGKILL));
	MUST(waitpid(child, NULL, 0));
	MUST(readlink("/proc/self/cwd", ended_cwd, sizeof ended_cwd - 1));
}
static void cwd_of_ended_check(void)
{
	char now[64] = "";
	MUST(readlink("/proc/self/cwd", now, sizeof now - 1));
	CHECK(!strcmp(now, ended_cwd), "the working directory is %s, not %s", now, ended_cwd);
	CHECK(open("1", O_PATH) == -1, "there is something in the working directory");
	expect_exit(proc_child, 0);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there is another child");
}
static void cwd_of_ended_spoil(void) { MUST(chdir("/proc")); }
STATE(cwd_of_ended)

static void namespaces_setup(void)
{
	static const char *const kinds[] = {"net", "pid", "mnt", "uts", "ipc", "user", "cgroup"};
	char path[64];
	for (int i = 0; i < 7; i++) {
		snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
		fds[i] = MUST(open(path, O_RDONLY | (i == 1 ? O_CLOEXEC : 0)));
	}
	fds[7] = MUST(open("/proc/self/ns/net", O_PATH));
}
static void namespaces_check(void)
{
	static const char *const kinds[] = {"net", "pid", "mnt", "uts", "ipc", "user", "cgroup", "net"};
	char path[64];
	for (int i = 0; i < 8; i++) {
		struct stat a, b;
		snprintf(path, sizeof path, "/proc/self/ns/%s", kinds[i]);
		MUST(fstat(fds[i], &a));
		MUST(stat(path, &b));
		CHECK(a.st_ino == b.st_ino && a.st_dev == b.st_dev, "the %s namespace is another", kinds[i]);
	}
	CHECK(MUST(fcntl(fds[1], F_GETFD)) == FD_CLOEXEC, "close-on-exec");
}
static void namespaces_spoil(void) { MUST(dup2(fds[0], fds[3])); }
STATE(namespaces)

static void sys_files_setup(void)
{
	fds[0] = MUST(open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY));
	char byte;
	MUST(read(fds[0], &byte, 1));
	fds[1] = MUST(open("/sys/devices/system/cpu", O_RDONLY | O_DIRECTORY));
	fds[2] = MUST(open("/sys/class/net", O_PATH));
	fds[3] = MUST(open("/sys/fs/cgroup", O_RDONLY | O_DIRECTORY));
}
static void sys_files_check(void)
{
	char text[64];
	CHECK(lseek(fds[0], 0, SEEK_CUR) == 1 && read(fds[0], text, sizeof text) > 4, "the file of /sys can't be read");
	MUST(faccessat(fds[1], "online", F_OK, 0));
	MUST(faccessat(fds[2], "lo", F_OK, 0));
	struct stat a, b;
	MUST(fstat(fds[3], &a));
	MUST(stat("/sys/fs/cgroup", &b));
	CHECK(a.st_ino == b.st_ino, "the cgroup directory is another");
}
static void sys_files_spoil(void) { MUST(lseek(fds[0], 0, SEEK_SET)); }
STATE(sys_files)

static void devices_setup(void)
{
	static const char *const names[] = {"null", "zero", "full", "random", "urandom"};
	char path[32];
	for (int i = 0; i < 5; i++) {
		snprintf(path, sizeof path, "/dev/%s", names[i]);
		fds[i] = MUST(open(path, i % 2 ? O_RDWR | O_NONBLOCK : O_RDWR));
	}
}
static void devices_check(void)
{
	char byte = 1;
	CHECK(read(fds[0], &byte, 1) == 0 && write(fds[0], &byte, 1) == 1, "null");
	CHECK(read(fds[1], &byte, 1) == 1 && byte == 0, "zero");
	CHECK(write(fds[2], &byte, 1) == -1 && errno == ENOSPC, "full");
	CHECK(read(fds[3], &byte, 1) == 1 && read(fds[4], &byte, 1) == 1, "random or urandom");
	CHECK(MUST(fcntl(fds[1], F_GETFL)) & O_NONBLOCK, "flags");
}
static void devices_spoil(void) { MUST(dup2(fds[1], fds[0])); }
STATE(devices)

/* Directories that are being read: nothing is lost and nothing comes twice. */

#define NAMES 40
static int seen[NAMES];
static int reading;

static int note(const char *name)
{
	int number;
	if (sscanf(name, "entry-%d", &number) != 1)
		return 0;
	seen[number]++;
	return 1;
}

/* Reads one buffer of entries; 0 at the end. */
static int step(size_t bytes)
{
	char buffer[4096];
	struct entry { uint64_t ino; int64_t off; uint16_t length; uint8_t type; char name[]; };
	long count = MUST(syscall(SYS_getdents64, reading, buffer, bytes));
	for (long at = 0; at < count;) {
		struct entry *entry = (struct entry *)(buffer + at);
		note(entry->name);
		at += entry->length;
	}
	return count > 0;
}

static void fill_directory(const char *path)
{
	char name[64];
	MUST(mkdir(path, 0700));
	for (int i = 0; i < NAMES; i++) {
		snprintf(name, sizeof name, "%s/entry-%d", path, (i * 7) % NAMES);
		close(MUST(open(name, O_CREAT | O_WRONLY, 0600)));
	}
	reading = MUST(open(path, O_RDONLY | O_DIRECTORY));
}

static void all_once(void)
{
	while (step(4096))
		;
	for (int i = 0; i < NAMES; i++)
		CHECK(seen[i] == 1, "entry %d came %d times", i, seen[i]);
}
static void spoil_reading(void) { MUST(lseek(reading, 0, SEEK_SET)); }

static void directory_middle_setup(void) { fill_directory("/tmp/reading"); step(300); step(300); }
static void directory_middle_check(void) { all_once(); }
#define directory_middle_spoil spoil_reading
STATE(directory_middle)

static void directory_middle_tmpfs_setup(void) { fill_directory("/dev/shm/reading"); step(300); step(300); }
static void directory_middle_tmpfs_check(void) { all_once(); }
#define directory_middle_tmpfs_spoil spoil_reading
STATE(directory_middle_tmpfs)

static void directory_end_setup(void) { fill_directory("/tmp/read-whole"); while (step(4096)); }
static void directory_end_check(void) { all_once(); }
#define directory_end_spoil spoil_reading
STATE(directory_end)

static void directory_end_tmpfs_setup(void) { fill_directory("/dev/shm/read-whole"); while (step(4096)); }
static void directory_end_tmpfs_check(void) { all_once(); }
#define directory_end_tmpfs_spoil spoil_reading
STATE(directory_end_tmpfs)

static int bin_entries, bin_seen;
static void directory_lower_setup(void)
{
	DIR *dir = opendir("/bin");
	while (readdir(dir))
		bin_entries++;
	closedir(dir);
	close(MUST(open("/bin/added", O_CREAT | O_WRONLY, 0700)));
	bin_entries++;
	reading = MUST(open("/bin", O_RDONLY | O_DIRECTORY));
	char buffer[100];
	long count = MUST(syscall(SYS_getdents64, reading, buffer, sizeof buffer));
	for (long at = 0; at < count; at += *(uint16_t *)(void *)(buffer + at + 16))
		bin_seen++;
}
static void directory_lower_check(void)
{
	char buffer[4096];
	long count;
	while ((count = MUST(syscall(SYS_getdents64, reading, buffer, sizeof buffer))) > 0)
		for (long at = 0; at < count; at += *(uint16_t *)(void *)(buffer + at + 16))
			bin_seen++;
	CHECK(bin_seen == bin_entries, "%d of %d entries", bin_seen, bin_entries);
}
#define directory_lower_spoil spoil_reading
STATE(directory_lower)
