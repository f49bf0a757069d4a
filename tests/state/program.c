/* The program that a process runs, and where it is. */
#include "state.h"
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/vfs.h>

static volatile struct {
	int stage, go;
	pid_t pid;
	char text[1024];
} *said;

static void prepare(void) { said = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)); }

static const char *link_of(pid_t pid, const char *name)
{
	static char text[4][512];
	static int next;
	char path[64];
	char *target = text[next++ % 4];
	snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
	target[MUST(readlink(path, target, 511))] = 0;
	return target;
}

static void copy(const char *from, const char *to, mode_t mode)
{
	char buffer[65536];
	int in = MUST(open(from, O_RDONLY)), out = MUST(open(to, O_WRONLY | O_CREAT | O_EXCL, mode));
	ssize_t count;
	while ((count = MUST(read(in, buffer, sizeof buffer))) > 0)
		MUST(write(out, buffer, (size_t)count));
	close(in);
	close(out);
}

/* --- Programs that are elsewhere now --- */

/* Runs a shell of busybox until /tmp/go exists; then it exits with 7. */
#define SCRIPT "echo >/tmp/started; while [ ! -e /tmp/go ]; do /bin/busybox sleep 0.02; done; exit 7"
static pid_t runner;

static void run_copy(const char *path)
{
	copy("/bin/busybox", path, 0755);
	if (!(runner = MUST(fork()))) {
		execl(path, "sh", "-c", SCRIPT, NULL);
		_exit(99);
	}
	while (access("/tmp/started", F_OK))
		usleep(1000);
}

static void expect_runs(void)
{
	CHECK(kill(runner, 0) == 0, "it does not run");
	close(MUST(open("/tmp/go", O_CREAT | O_WRONLY, 0600)));
	expect_exit(runner, 7);
}

static void end_runner(void)
{
	MUST(kill(runner, SIGKILL));
}

static void program_in_tmp_setup(void) { run_copy("/tmp/program"); }
static void program_in_tmp_check(void)
{
	CHECK(!strcmp(link_of(runner, "exe"), "/tmp/program"), "it is %s", link_of(runner, "exe"));
	expect_runs();
}
static void program_in_tmp_spoil(void) { end_runner(); }
STATE(program_in_tmp)

/* A program that was only ever in memory, whose last descriptor went with its start. */
static int sealed_program;
static void program_in_memory_setup(void)
{
	copy("/bin/busybox", "/tmp/program", 0755);
	if (!(runner = MUST(fork()))) {
		char *arguments[] = {"sh", "-c", SCRIPT, NULL}, *environment[] = {NULL}, buffer[65536], path[64];
		ssize_t count;
		int from = MUST(open("/tmp/program", O_RDONLY));
		int to = MUST(memfd_create("tool", MFD_CLOEXEC | MFD_ALLOW_SEALING));
		while ((count = MUST(read(from, buffer, sizeof buffer))) > 0)
			MUST(write(to, buffer, (size_t)count));
		MUST(fcntl(to, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
		/* Who can write to it is no reader of a program. */
		snprintf(path, sizeof path, "/proc/self/fd/%d", to);
		int program = MUST(open(path, O_RDONLY | O_CLOEXEC));
		close(to);
		syscall(SYS_execveat, program, "", arguments, environment, AT_EMPTY_PATH);
		_exit(99);
	}
	while (access("/tmp/started", F_OK))
		usleep(1000);
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/exe", runner);
	sealed_program = MUST(open(path, O_RDONLY));
}
static void program_in_memory_check(void)
{
	CHECK(!strcmp(link_of(runner, "exe"), "/memfd:tool (deleted)"), "it is %s", link_of(runner, "exe"));
	int seals = MUST(fcntl(sealed_program, F_GET_SEALS));
	CHECK(seals == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), "its seals are %#x", seals);
	expect_runs();
}
static void program_in_memory_spoil(void) { end_runner(); }
STATE(program_in_memory)

static void program_removed_setup(void)
{
	run_copy("/tmp/program");
	MUST(unlink("/tmp/program"));
}
static void program_removed_check(void)
{
	CHECK(access("/tmp/program", F_OK) == -1, "the program is there again");
	CHECK(!strcmp(link_of(runner, "exe"), "/tmp/program (deleted)"), "it is %s", link_of(runner, "exe"));
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/exe", runner);
	struct stat one, other;
	MUST(stat(path, &one));
	MUST(stat("/bin/busybox", &other));
	CHECK(one.st_size == other.st_size && one.st_nlink == 0, "the file has %ld bytes", (long)one.st_size);
	expect_runs();
}
static void program_removed_spoil(void) { end_runner(); }
STATE(program_removed)

static void program_replaced_setup(void)
{
	run_copy("/tmp/program");
	copy("/bin/state", "/tmp/new", 0755);
	MUST(rename("/tmp/new", "/tmp/program"));
}
static void program_replaced_check(void)
{
	struct stat one, other;
	MUST(stat("/tmp/program", &one));
	MUST(stat("/bin/state", &other));
	CHECK(one.st_size == other.st_size, "the new program is another");
	expect_runs();
}
static void program_replaced_spoil(void) { end_runner(); }
STATE(program_replaced)

static void program_renamed_setup(void)
{
	run_copy("/tmp/program");
	MUST(rename("/tmp/program", "/tmp/other name"));
}
static void program_renamed_check(void)
{
	CHECK(!strcmp(link_of(runner, "exe"), "/tmp/other name"), "it is %s", link_of(runner, "exe"));
	expect_runs();
}
static void program_renamed_spoil(void) { end_runner(); }
STATE(program_renamed)

static void program_of_script_setup(void)
{
	int fd = MUST(open("/tmp/script", O_WRONLY | O_CREAT, 0755));
	const char *text = "#!/bin/sh\n" SCRIPT "\n";
	MUST(write(fd, text, strlen(text)));
	close(fd);
	if (!(runner = MUST(fork()))) {
		execl("/tmp/script", "script", NULL);
		_exit(99);
	}
	while (access("/tmp/started", F_OK))
		usleep(1000);
	MUST(unlink("/tmp/script"));
}
static void program_of_script_check(void)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/comm", runner);
	CHECK(!strcmp(content(path), "script\n"), "its name is %s", content(path));
	expect_runs();
}
static void program_of_script_spoil(void) { end_runner(); }
STATE(program_of_script)

/* --- What it is called --- */

static char *arguments, *long_name;
static size_t argument_bytes;

static void name_changed_setup(void)
{
	MUST(prctl(PR_SET_NAME, "a name) with (x"));
}
static void name_changed_check(void)
{
	char name[16];
	MUST(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, "a name) with (x"), "its name is %s", name);
	CHECK(!strcmp(content("/proc/self/comm"), "a name) with (x\n"), "its name is %s", content("/proc/self/comm"));
}
static void name_changed_spoil(void) { MUST(prctl(PR_SET_NAME, "other")); }
STATE(name_changed)

static void name_empty_setup(void) { MUST(prctl(PR_SET_NAME, "")); }
static void name_empty_check(void) { CHECK(!strcmp(content("/proc/self/comm"), "\n"), "its name is %s", content("/proc/self/comm")); }
static void name_empty_spoil(void) { MUST(prctl(PR_SET_NAME, "other")); }
STATE(name_empty)

/* The address of the arguments is in /proc/self/stat. */
static unsigned long stat_number(int field)
{
	const char *rest = strrchr(content("/proc/self/stat"), ')') + 2;
	for (int at = 3; at < field; at++)
		rest = strchr(rest, ' ') + 1;
	return strtoul(rest, NULL, 10);
}

static void arguments_rewritten_setup(void)
{
	arguments = (char *)stat_number(48);
	argument_bytes = stat_number(49) - stat_number(48);
	memset(arguments, 0, argument_bytes);
	snprintf(arguments, argument_bytes, "worker 1");
}
static void arguments_rewritten_check(void)
{
	CHECK(!strncmp(content("/proc/self/cmdline"), "worker 1", 8), "it is called as %s", content("/proc/self/cmdline"));
	CHECK(stat_number(48) == (unsigned long)arguments, "the arguments are elsewhere");
}
static void arguments_rewritten_spoil(void) { arguments[0] = 'W'; }
STATE(arguments_rewritten)

static void arguments_moved_setup(void)
{
	long_name = MUST(mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memset(long_name, 'x', 5000);
	memset(long_name + 5001, 'E', 100);
	unsigned long name = (unsigned long)long_name;
	struct prctl_mm_map map = {
		.start_code = stat_number(26), .end_code = stat_number(27), .start_data = stat_number(45),
		.end_data = stat_number(46), .start_brk = stat_number(47), .brk = (unsigned long)sbrk(0),
		.start_stack = stat_number(28), .arg_start = name, .arg_end = name + 5001, .env_start = name + 5001,
		.env_end = name + 5101, .exe_fd = (uint32_t)-1,
	};
	MUST(prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0));
}
static void arguments_moved_check(void)
{
	CHECK(strlen(content("/proc/self/cmdline")) == 5000, "the arguments have %zu bytes", strlen(content("/proc/self/cmdline")));
	CHECK(content("/proc/self/environ")[99] == 'E', "the environment is another");
}
static void arguments_moved_spoil(void) { long_name[100] = 0; }
STATE(arguments_moved)

static char vector[2048];
static size_t vector_bytes;
static void *brk_now;

static size_t read_vector(char *to)
{
	int fd = MUST(open("/proc/self/auxv", O_RDONLY));
	size_t bytes = (size_t)MUST(read(fd, to, sizeof vector));
	close(fd);
	return bytes;
}
static void layout_setup(void)
{
	vector_bytes = read_vector(vector);
	brk_now = (char *)MUST(sbrk(0)) + 3 * 4096 + 123;
	MUST(brk(brk_now));
}
static void layout_check(void)
{
	char now[sizeof vector];
	CHECK(sbrk(0) == brk_now, "the break is at %p, not at %p", sbrk(0), brk_now);
	CHECK(read_vector(now) == vector_bytes && !memcmp(now, vector, vector_bytes), "the auxiliary vector is another");
	CHECK(!strcmp(link_of(1, "exe"), "/bin/state"), "it runs %s", link_of(1, "exe"));
	MUST(brk((char *)brk_now + 65536));
	memset(brk_now, 1, 65536);
}
static void layout_spoil(void) { MUST(brk((char *)brk_now + 4096)); }
STATE(layout)

static void *execs(void *unused)
{
	(void)unused;
	execl("/bin/busybox", "sh", "-c", SCRIPT, NULL);
	_exit(99);
}
/* The thread becomes the process. */
static void program_started_by_thread_setup(void)
{
	if (!(runner = MUST(fork()))) {
		pthread_t thread;
		pthread_create(&thread, NULL, execs, NULL);
		pause();
	}
	while (access("/tmp/started", F_OK))
		usleep(1000);
}
static void program_started_by_thread_check(void) { expect_runs(); }
static void program_started_by_thread_spoil(void) { end_runner(); }
STATE(program_started_by_thread)

/* --- Where it is --- */

static char buffer[512];

static const char *here(void) { return getcwd(buffer, sizeof buffer) ? buffer : "?"; }

#define IN_DIRECTORY(id, path, ...) \
	static void id##_setup(void) { MUST(chdir(path)); } \
	static void id##_check(void) { CHECK(!strcmp(here(), path), "it is in %s", here()); } \
	static void id##_spoil(void) { MUST(chdir("/")); } \
	STATE(id, ##__VA_ARGS__)
IN_DIRECTORY(directory_of_tmpfs, "/dev/shm")
IN_DIRECTORY(directory_of_proc, "/proc/1/task/1/fd")
IN_DIRECTORY(directory_of_sys, "/sys/devices")
IN_DIRECTORY(directory_of_dev, "/dev/pts")

static void directory_with_odd_name_setup(void)
{
	MUST(mkdir("/tmp/a b\n\t(deleted)", 0700));
	MUST(chdir("/tmp/a b\n\t(deleted)"));
}
static void directory_with_odd_name_check(void) { CHECK(!strcmp(here(), "/tmp/a b\n\t(deleted)"), "it is in %s", here()); }
static void directory_with_odd_name_spoil(void) { MUST(chdir("/")); }
STATE(directory_with_odd_name)

static void directory_named_deleted_setup(void)
{
	MUST(mkdir("/tmp/a (deleted)", 0700));
	MUST(chdir("/tmp/a (deleted)"));
}
static void directory_named_deleted_check(void) { CHECK(!strcmp(here(), "/tmp/a (deleted)"), "it is in %s", here()); }
static void directory_named_deleted_spoil(void) { MUST(chdir("/")); }
STATE(directory_named_deleted)

static void expect_removed(const char *was)
{
	struct stat status;
	char link[600];
	CHECK(!getcwd(buffer, sizeof buffer) && errno == ENOENT, "it is in %s", buffer);
	MUST(stat(".", &status));
	CHECK((status.st_mode & 07777) == 0751 && status.st_uid == 1000, "it is of %d, mode %o", status.st_uid, status.st_mode);
	CHECK(open("file", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT, "files can be made in it");
	snprintf(link, sizeof link, "%s (deleted)", was);
	CHECK(!strcmp(link_of(getpid(), "cwd"), link), "it was in %s", link_of(getpid(), "cwd"));
}

static void remove_here(const char *path)
{
	MUST(mkdir(path, 0700));
	MUST(chmod(path, 0751));
	MUST(chown(path, 1000, 1000));
	MUST(chdir(path));
	MUST(rmdir(path));
}

static struct timespec parents_time;

static void directory_removed_setup(void)
{
	struct stat status;
	remove_here("/var/tmp/gone");
	MUST(stat("/var/tmp", &status));
	parents_time = status.st_mtim;
}
static void directory_removed_check(void)
{
	struct stat status;
	expect_removed("/var/tmp/gone");
	MUST(stat("/var/tmp", &status));
	CHECK(!memcmp(&status.st_mtim, &parents_time, sizeof parents_time), "the directory above has another time");
	CHECK(access("/var/tmp/gone", F_OK) == -1, "it is there again");
}
static void directory_removed_spoil(void) { MUST(chdir("/")); }
STATE(directory_removed)

static void directory_removed_with_parents_setup(void)
{
	MUST(mkdir("/tmp/one", 0700));
	MUST(mkdir("/tmp/one/two", 0700));
	remove_here("/tmp/one/two/three");
	MUST(rmdir("/tmp/one/two"));
	MUST(rmdir("/tmp/one"));
}
static void directory_removed_with_parents_check(void)
{
	expect_removed("/tmp/one/two/three");
	CHECK(access("/tmp/one", F_OK) == -1, "it is there again");
}
static void directory_removed_with_parents_spoil(void) { MUST(chdir("/")); }
STATE(directory_removed_with_parents)

static void directory_removed_and_made_again_setup(void)
{
	remove_here("/tmp/gone");
	MUST(mkdir("/tmp/gone", 0700));
}
static void directory_removed_and_made_again_check(void)
{
	CHECK(!getcwd(buffer, sizeof buffer) && errno == ENOENT, "it is in %s", buffer);
	CHECK(access("/tmp/gone", F_OK) == 0, "the new one is gone");
}
static void directory_removed_and_made_again_spoil(void) { MUST(chdir("/")); }
STATE(directory_removed_and_made_again)

static int removed_body(void)
{
	while (!said->go)
		usleep(1000);
	return access("..", F_OK) == 0 || !getcwd(buffer, sizeof buffer) ? 0 : 1;
}
static void directory_removed_of_two_setup(void)
{
	prepare();
	remove_here("/tmp/gone");
	runner = in_child(removed_body);
}
static void directory_removed_of_two_check(void)
{
	expect_removed("/tmp/gone");
	said->go = 1;
	expect_exit(runner, 0);
}
static void directory_removed_of_two_spoil(void) { MUST(chdir("/")); }
STATE(directory_removed_of_two)

static void directory_moved_setup(void)
{
	MUST(mkdir("/tmp/before", 0700));
	MUST(chdir("/tmp/before"));
	MUST(rename("/tmp/before", "/tmp/after"));
	MUST(mkdir("/tmp/before", 0700));
}
static void directory_moved_check(void)
{
	CHECK(!strcmp(here(), "/tmp/after"), "it is in %s", here());
	close(MUST(open("file", O_CREAT | O_WRONLY, 0600)));
	CHECK(access("/tmp/after/file", F_OK) == 0, "a file is elsewhere");
}
static void directory_moved_spoil(void) { MUST(chdir("/tmp/before")); }
STATE(directory_moved)

static mode_t masks[] = {0, 022, 077, 0777, 0531};

static int mask_body(void)
{
	mode_t mask = masks[said->stage];
	umask(mask);
	said->stage++;
	while (!said->go)
		usleep(1000);
	return umask(0) == mask ? 0 : 1;
}
static pid_t masked[5];

static void umasks_setup(void)
{
	prepare();
	for (int i = 0; i < 5; i++) {
		masked[i] = in_child(mask_body);
		while (said->stage <= i)
			usleep(1000);
	}
}
static void umasks_check(void)
{
	said->go = 1;
	for (int i = 0; i < 5; i++)
		expect_exit(masked[i], 0);
}
static void umasks_spoil(void) { MUST(kill(masked[2], SIGKILL)); }
STATE(umasks)

/* --- chroot --- */

static const char *chroot_there, *chroot_seen;

static int chroot_body(void)
{
	MUST(mkdir("/tmp/jail", 0755));
	MUST(mkdir("/tmp/jail/inside", 0755));
	MUST(chroot("/tmp/jail"));
	MUST(chdir(chroot_there));
	said->stage = 1;
	while (!said->go)
		usleep(1000);
	if (access("/inside", F_OK) || !access("/bin", F_OK))
		return 2;
	/* Not getcwd, which does not return what is unreachable. */
	if (syscall(SYS_getcwd, buffer, sizeof buffer) < 0)
		return 3;
	return strcmp(buffer, chroot_seen) ? 4 : 0;
}
static void chroot_to(const char *there, const char *seen)
{
	prepare();
	chroot_there = there;
	chroot_seen = seen;
	runner = in_child(chroot_body);
	while (!said->stage)
		usleep(1000);
}
static void expect_in_jail(void)
{
	CHECK(!strcmp(link_of(runner, "root"), "/tmp/jail"), "its root is %s", link_of(runner, "root"));
	said->go = 1;
	expect_exit(runner, 0);
}

/* The container's own init, which everything else in it is found by. */
static void chroot_of_init_setup(void)
{
	close(MUST(open("/dev/shm/kept", O_CREAT | O_RDWR, 0600)));
	finish_at = MUST(open("/", O_PATH | O_CLOEXEC));
	MUST(mkdir("/tmp/jail", 0755));
	MUST(mkdir("/tmp/jail/inside", 0755));
	MUST(chroot("/tmp/jail"));
	MUST(chdir("/inside"));
	close(MUST(open("made", O_CREAT | O_RDWR, 0600)));
}
static void chroot_of_init_check(void)
{
	CHECK(access("/bin", F_OK) && !access("/inside/made", F_OK), "it is not in its jail");
	CHECK(syscall(SYS_getcwd, buffer, sizeof buffer) > 0 && !strcmp(buffer, "/inside"), "it is in %s", buffer);
	CHECK(!faccessat(finish_at, "dev/shm/kept", F_OK, 0), "a file in memory is gone");
	struct stat root, jail;
	MUST(stat("/", &root));
	MUST(fstatat(finish_at, "tmp/jail", &jail, 0));
	CHECK(root.st_dev == jail.st_dev && root.st_ino == jail.st_ino, "its root is another directory");
}
static void chroot_of_init_spoil(void)
{
	MUST(fchdir(finish_at));
	MUST(chroot("."));
}
STATE(chroot_of_init)

static void chroot_plain_setup(void) { chroot_to("/", "/"); }
static void chroot_plain_check(void) { expect_in_jail(); }
static void chroot_plain_spoil(void) { end_runner(); }
STATE(chroot_plain)

static void chroot_inside_setup(void) { chroot_to("/inside", "/inside"); }
static void chroot_inside_check(void) { expect_in_jail(); }
static void chroot_inside_spoil(void) { end_runner(); }
STATE(chroot_inside)

static void chroot_with_directory_outside_setup(void)
{
	MUST(chdir("/var"));
	chroot_to(".", "(unreachable)/var");
}
static void chroot_with_directory_outside_check(void)
{
	CHECK(!strcmp(link_of(runner, "cwd"), "/var"), "it is in %s", link_of(runner, "cwd"));
	expect_in_jail();
}
static void chroot_with_directory_outside_spoil(void) { end_runner(); }
STATE(chroot_with_directory_outside)

static int chroot_to_tmpfs(void)
{
	MUST(mkdir("/dev/shm/jail", 0755));
	MUST(chroot("/dev/shm/jail"));
	MUST(chdir("/"));
	MUST(setresuid(1000, 1000, 1000));
	said->stage = 1;
	while (!said->go)
		usleep(1000);
	return access("/bin", F_OK) && getuid() == 1000 ? 0 : 1;
}
static void chroot_as_user_setup(void)
{
	prepare();
	runner = in_child(chroot_to_tmpfs);
	while (!said->stage)
		usleep(1000);
}
static void chroot_as_user_check(void)
{
	said->go = 1;
	expect_exit(runner, 0);
}
static void chroot_as_user_spoil(void) { end_runner(); }
STATE(chroot_as_user)
