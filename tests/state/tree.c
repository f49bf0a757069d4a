/* The process tree: parents, sessions, groups, the dead, the stopped. */
#include "state.h"
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

/* What a process is to the others. */
struct place {
	pid_t pid, parent, group, session;
};

/* Numbers that processes tell each other; shared, and kept by a restore. */
static volatile pid_t *told;

static void share(void)
{
	told = MUST(mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

static pid_t await(int slot)
{
	while (!told[slot])
		usleep(1000);
	return told[slot];
}

/* A field of /proc/PID/stat, by its number there. */
static long stat_field(pid_t pid, int field)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	if (access(path, F_OK))
		return -1;
	const char *rest = strrchr(content(path), ')') + 2;
	if (field == 3)
		return *rest;
	for (int at = 3; at < field; at++)
		rest = strchr(rest, ' ') + 1;
	return atol(rest);
}

static struct place place_of(pid_t pid)
{
	return (struct place){pid, (pid_t)stat_field(pid, 4), (pid_t)stat_field(pid, 5), (pid_t)stat_field(pid, 6)};
}

static void expect_place(struct place was)
{
	struct place is = place_of(was.pid);
	CHECK(!memcmp(&is, &was, sizeof was), "process %d is child of %d in group %d, session %d, was of %d in %d, %d", was.pid,
		is.parent, is.group, is.session, was.parent, was.group, was.session);
}

static void await_state(pid_t pid, char state)
{
	while (stat_field(pid, 3) != state)
		usleep(1000);
}

static int sleeps(void)
{
	until_finishing();
	return 0;
}

/* Lives until it is killed. */
static int stays(void)
{
	while (getppid() >= 0)
		pause();
	return 0;
}

static void kill_one(pid_t pid)
{
	kill(pid, SIGKILL);
	usleep(20000);
}

/* --- The dead --- */

static pid_t dead[400];

static int code_body(void) { return 37; }

static void zombie_code_setup(void)
{
	dead[0] = in_child(code_body);
	await_state(dead[0], 'Z');
}
static void zombie_code_check(void) { expect_exit(dead[0], 37); }
static void zombie_code_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(zombie_code)

static const int ends[] = {SIGKILL, SIGTERM, SIGHUP, SIGUSR2, SIGALRM, SIGPIPE, 34, 64};

static void zombies_by_signals_setup(void)
{
	for (unsigned i = 0; i < sizeof ends / sizeof *ends; i++) {
		dead[i] = in_child(stays);
		MUST(kill(dead[i], ends[i]));
		await_state(dead[i], 'Z');
	}
}
static void zombies_by_signals_check(void)
{
	for (unsigned i = 0; i < sizeof ends / sizeof *ends; i++) {
		int status;
		CHECK(waitpid(dead[i], &status, 0) == dead[i] && status == ends[i], "the status is %#x, not %#x", status, ends[i]);
	}
}
static void zombies_by_signals_spoil(void) { MUST(waitpid(dead[2], NULL, 0)); }
STATE(zombies_by_signals)

static int crash_without_dump(void)
{
	setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
	raise(SIGSEGV);
	return 0;
}
static void zombie_without_core_setup(void)
{
	dead[0] = in_child(crash_without_dump);
	await_state(dead[0], 'Z');
}
static void zombie_without_core_check(void)
{
	int status;
	CHECK(waitpid(dead[0], &status, 0) == dead[0] && status == SIGSEGV, "the status is %#x", status);
	CHECK(access("/core", F_OK), "somebody has dumped a core");
}
static void zombie_without_core_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(zombie_without_core)

static int core_status;

static int crash_with_dump(void)
{
	setrlimit(RLIMIT_CORE, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY});
	MUST(chdir("/tmp"));
	raise(SIGQUIT);
	return 0;
}
static void zombie_with_core_setup(void)
{
	siginfo_t info;
	dead[0] = in_child(crash_with_dump);
	MUST(waitid(P_PID, (id_t)dead[0], &info, WEXITED | WNOWAIT));
	core_status = info.si_code;
}
static void zombie_with_core_check(void)
{
	siginfo_t info;
	MUST(waitid(P_PID, (id_t)dead[0], &info, WEXITED));
	CHECK(info.si_status == SIGQUIT && info.si_code == core_status, "it ended with %d, code %d, not %d", info.si_status,
		info.si_code, core_status);
	CHECK(access("/core", F_OK), "somebody has dumped another core");
}
static void zombie_with_core_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(zombie_with_core)

static void zombies_many_setup(void)
{
	for (int i = 0; i < 300; i++) {
		pid_t child = dead[i] = MUST(fork());
		if (!child)
			_exit(i & 255);
	}
	for (int i = 0; i < 300; i++)
		await_state(dead[i], 'Z');
}
static void zombies_many_check(void)
{
	for (int i = 299; i >= 0; i--)
		expect_exit(dead[i], i & 255);
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there are more children");
}
static void zombies_many_spoil(void) { MUST(waitpid(dead[200], NULL, 0)); }
STATE(zombies_many)

static int other_user(void)
{
	MUST(prctl(PR_SET_NAME, "late lamented"));
	MUST(setresuid(1000, 1001, 1002));
	return 5;
}
static void zombie_of_user_setup(void)
{
	dead[0] = in_child(other_user);
	await_state(dead[0], 'Z');
}
static void zombie_of_user_check(void)
{
	siginfo_t info;
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/comm", dead[0]);
	CHECK(!strcmp(content(path), "late lamented\n"), "its name is %s", content(path));
	MUST(waitid(P_PID, (id_t)dead[0], &info, WEXITED));
	CHECK(info.si_uid == 1000, "it was of user %d", info.si_uid);
}
static void zombie_of_user_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(zombie_of_user)

static int has_zombie(void)
{
	pid_t child = in_child(code_body);
	await_state(child, 'Z');
	told[0] = child;
	until_finishing();
	int status;
	return waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 37 ? 11 : 1;
}
static void zombie_of_child_setup(void)
{
	share();
	dead[0] = in_child(has_zombie);
	await(0);
}
static void zombie_of_child_check(void) { expect_exit(dead[0], 11); }
static void zombie_of_child_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(zombie_of_child)

static int leaves_zombie(void)
{
	pid_t child = in_child(code_body);
	await_state(child, 'Z');
	told[0] = child;
	return 0;
}
static void zombie_inherited_setup(void)
{
	share();
	pid_t middle = in_child(leaves_zombie);
	expect_exit(middle, 0);
}
static void zombie_inherited_check(void)
{
	CHECK(stat_field(told[0], 4) == 1, "its parent is %ld", stat_field(told[0], 4));
	expect_exit(told[0], 37);
}
static void zombie_inherited_spoil(void) { MUST(waitpid(told[0], NULL, 0)); }
STATE(zombie_inherited)

static int leads_and_ends(void)
{
	MUST(setsid());
	told[1] = in_child(sleeps);
	told[0] = getpid();
	return 3;
}
static struct place member, leader;

static void zombie_leads_session_setup(void)
{
	share();
	dead[0] = in_child(leads_and_ends);
	await_state(dead[0], 'Z');
	while (stat_field(told[1], 4) != 1)
		usleep(1000);
	member = place_of(told[1]);
	leader = place_of(dead[0]);
}
static void zombie_leads_session_check(void)
{
	CHECK(member.session == dead[0], "the setup failed");
	expect_place(leader);
	expect_exit(dead[0], 3);
	expect_exit(member.pid, 0);
}
static void zombie_leads_session_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(zombie_leads_session)

static int quiet_child(void *unused)
{
	(void)unused;
	return 9;
}
static char quiet_stack[2][65536];

static void zombies_with_other_signals_setup(void)
{
	MUST(signal(SIGUSR1, SIG_IGN) == SIG_ERR ? -1 : 0);
	dead[0] = MUST(clone(quiet_child, quiet_stack[0] + 65536, 0, NULL));
	dead[1] = MUST(clone(quiet_child, quiet_stack[1] + 65536, SIGUSR1, NULL));
	await_state(dead[0], 'Z');
	await_state(dead[1], 'Z');
}
static void zombies_with_other_signals_check(void)
{
	int status;
	CHECK(waitpid(dead[0], &status, WNOHANG) == -1 && errno == ECHILD, "it is an ordinary child");
	CHECK(waitpid(dead[0], &status, __WCLONE) == dead[0] && status == 9 << 8, "its status is %#x", status);
	CHECK(stat_field(dead[1], 38) == SIGUSR1, "its signal is %ld", stat_field(dead[1], 38));
	CHECK(waitpid(dead[1], &status, __WALL) == dead[1] && status == 9 << 8, "its status is %#x", status);
}
static void zombies_with_other_signals_spoil(void) { MUST(waitpid(dead[0], NULL, __WCLONE)); }
STATE(zombies_with_other_signals)

static int slow_quiet_child(void *unused)
{
	(void)unused;
	until_finishing();
	return 9;
}
static volatile sig_atomic_t told_by_signal;

static void note_signal(int signal) { told_by_signal = signal; }

static void child_with_other_signal_setup(void)
{
	signal(SIGUSR2, note_signal);
	dead[0] = MUST(clone(slow_quiet_child, quiet_stack[0] + 65536, 0, NULL));
	dead[1] = MUST(clone(slow_quiet_child, quiet_stack[1] + 65536, SIGUSR2, NULL));
}
static void child_with_other_signal_check(void)
{
	int status;
	CHECK(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD, "there are ordinary children");
	CHECK(waitpid(dead[0], &status, __WCLONE) == dead[0] && status == 9 << 8, "the status is %#x", status);
	CHECK(waitpid(dead[1], &status, __WCLONE) == dead[1] && status == 9 << 8, "the status is %#x", status);
	CHECK(told_by_signal == SIGUSR2, "no signal has come");
}
static void child_with_other_signal_spoil(void) { MUST(waitpid(dead[0], NULL, __WCLONE)); }
STATE(child_with_other_signal)

static sigset_t chld;

static void zombie_with_signal_pending_setup(void)
{
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	MUST(sigprocmask(SIG_BLOCK, &chld, NULL));
	dead[0] = in_child(code_body);
	await_state(dead[0], 'Z');
}
static void zombie_with_signal_pending_check(void)
{
	siginfo_t info;
	CHECK(sigtimedwait(&chld, &info, &(struct timespec){0}) == SIGCHLD, "no SIGCHLD waits");
	CHECK(info.si_pid == dead[0] && info.si_status == 37 && info.si_code == CLD_EXITED, "it is of %d, status %d, code %d",
		info.si_pid, info.si_status, info.si_code);
	expect_exit(dead[0], 37);
	CHECK(sigtimedwait(&chld, &info, &(struct timespec){0}) == -1, "another SIGCHLD waits");
}
static void zombie_with_signal_pending_spoil(void)
{
	siginfo_t info;
	sigtimedwait(&chld, &info, &(struct timespec){0});
}
STATE(zombie_with_signal_pending)

static void zombie_with_signal_taken_setup(void)
{
	zombie_with_signal_pending_setup();
	siginfo_t info;
	MUST(sigtimedwait(&chld, &info, &(struct timespec){.tv_sec = 5}));
}
static void zombie_with_signal_taken_check(void)
{
	siginfo_t info;
	CHECK(sigtimedwait(&chld, &info, &(struct timespec){0}) == -1, "a SIGCHLD waits");
	expect_exit(dead[0], 37);
}
static void zombie_with_signal_taken_spoil(void) { MUST(kill(getpid(), SIGCHLD)); }
STATE(zombie_with_signal_taken)

static void children_not_waited_for_setup(void)
{
	struct sigaction action = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT};
	MUST(sigaction(SIGCHLD, &action, NULL));
	dead[0] = in_child(stays);
}
static void children_not_waited_for_check(void)
{
	kill_one(dead[0]);
	CHECK(kill(dead[0], 0) == -1 && errno == ESRCH, "it left a zombie");
}
static void children_not_waited_for_spoil(void) { signal(SIGCHLD, SIG_DFL); }
STATE(children_not_waited_for)

/* --- Orphans --- */

static int makes_orphan(void)
{
	told[0] = in_child(stays);
	return 0;
}
static void orphan_setup(void)
{
	share();
	expect_exit(in_child(makes_orphan), 0);
	member = place_of(told[0]);
}
static void orphan_check(void)
{
	CHECK(member.parent == 1, "the setup failed");
	expect_place(member);
	MUST(kill(told[0], SIGKILL));
	CHECK(waitpid(told[0], NULL, 0) == told[0], "it is nobody's child");
}
static void orphan_spoil(void)
{
	MUST(kill(told[0], SIGKILL));
	MUST(waitpid(told[0], NULL, 0));
}
STATE(orphan)

static int middle_for_reaper(void)
{
	told[2] = in_child(stays);
	told[1] = getpid();
	return stays();
}
static int reaper_body(void)
{
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	expect_exit(in_child(makes_orphan), 0);
	in_child(middle_for_reaper);
	await(1);
	told[3] = 1;
	until_finishing();
	/* One orphan from before, and one from after. */
	kill_one(told[1]);
	pid_t ended = waitpid(told[1], NULL, 0);
	int wrong = ended != told[1] || stat_field(told[0], 4) != getpid() || stat_field(told[2], 4) != getpid();
	kill(told[0], SIGKILL);
	kill(told[2], SIGKILL);
	return wrong ? 1 : 0;
}
static void subreaper_setup(void)
{
	share();
	dead[0] = in_child(reaper_body);
	await(3);
}
static void subreaper_check(void) { expect_exit(dead[0], 0); }
static void subreaper_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(subreaper)

static int daemon_second(void)
{
	told[1] = in_child(stays);
	told[0] = getpid();
	return stays();
}
static int daemon_first(void)
{
	MUST(setsid());
	MUST(fork()) == 0 ? _exit(daemon_second()) : (void)await(0);
	return 0;
}
static struct place places[32];
static int places_used;

static void remember(pid_t pid) { places[places_used++] = place_of(pid); }

static void expect_places(void)
{
	for (int i = 0; i < places_used; i++)
		expect_place(places[i]);
}

static void double_fork_setup(void)
{
	share();
	dead[0] = in_child(daemon_first);
	expect_exit(dead[0], 0);
	remember(told[0]);
	remember(told[1]);
}
static void double_fork_check(void)
{
	CHECK(places[0].session == dead[0] && places[0].parent == 1, "the setup failed");
	expect_places();
	MUST(kill(told[0], SIGKILL));
	CHECK(waitpid(told[0], NULL, 0) == told[0], "it is nobody's child");
}
static void double_fork_spoil(void)
{
	MUST(kill(told[0], SIGKILL));
	MUST(waitpid(told[0], NULL, 0));
}
STATE(double_fork)

static int reaper_of_daemon(void)
{
	MUST(setsid());
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	expect_exit(in_child(daemon_first), 0);
	told[2] = getpid();
	return stays();
}
static void double_fork_below_subreaper_setup(void)
{
	share();
	dead[0] = in_child(reaper_of_daemon);
	await(2);
	remember(dead[0]);
	remember(told[0]);
	remember(told[1]);
}
static void double_fork_below_subreaper_check(void)
{
	CHECK(places[1].parent == dead[0] && places[1].session != dead[0], "the setup failed");
	expect_places();
}
static void double_fork_below_subreaper_spoil(void) { kill_one(dead[0]); }
STATE(double_fork_below_subreaper)

static int child_before_session(void)
{
	told[0] = in_child(stays);
	MUST(setsid());
	told[1] = in_child(stays);
	return stays();
}
static void child_from_before_session_setup(void)
{
	share();
	dead[0] = in_child(child_before_session);
	await(1);
	remember(dead[0]);
	remember(told[0]);
	remember(told[1]);
}
static void child_from_before_session_check(void)
{
	CHECK(places[1].session == 1 && places[2].session == dead[0], "the setup failed");
	expect_places();
}
static void child_from_before_session_spoil(void) { kill_one(dead[0]); }
STATE(child_from_before_session)

static int middle_orphans_to_init(void)
{
	MUST(setsid());
	if (MUST(fork()) == 0) {
		told[1] = in_child(stays);
		_exit(0);
	}
	MUST(wait(NULL));
	told[0] = getpid();
	return stays();
}
static int parent_of_leader(void)
{
	in_child(middle_orphans_to_init);
	return stays();
}
/* A session whose leader is deep in the tree, and one of whose members is init's child. */
static void orphan_of_deep_leader_setup(void)
{
	share();
	dead[0] = in_child(parent_of_leader);
	await(0);
	remember(dead[0]);
	remember(told[0]);
	remember(told[1]);
}
static void orphan_of_deep_leader_check(void)
{
	CHECK(places[2].parent == 1 && places[2].session == told[0] && places[1].parent == dead[0], "the setup failed");
	expect_places();
}
static void orphan_of_deep_leader_spoil(void) { kill_one(dead[0]); }
STATE(orphan_of_deep_leader)

/*
 * A session with members below two processes of which none is above the other any more: one has adopted the orphan of what was
 * below it, and then the other was adopted from below it.
 */
enum { UPPER = 10, LOWER, MEMBER, ORPHAN, ORPHANED, MIDDLE, MIDDLE_ENDS };

static void come_to(int slot)
{
	told[slot] = getpid();
}
static int parent_of_orphan(void)
{
	told[ORPHAN] = in_child(stays);
	await(ORPHANED);
	return 0;
}
static int leader_of_both(void)
{
	MUST(setsid());
	told[MEMBER] = in_child(stays);
	in_child(parent_of_orphan);
	await(ORPHAN);
	return 0;
}
static int lower_parent(void)
{
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	pid_t leader = in_child(leader_of_both);
	MUST(waitpid(leader, NULL, 0));
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 0));
	told[ORPHANED] = 1;
	/* The parent of the orphan, which is this one's child since its own has ended. */
	MUST(waitpid(-1, NULL, 0));
	told[MIDDLE_ENDS] = 1;
	while (getppid() == told[MIDDLE])
		usleep(1000);
	MUST(setsid());
	come_to(LOWER);
	return stays();
}
static int between_parents(void)
{
	come_to(MIDDLE);
	in_child(lower_parent);
	await(0);
	return 0;
}
static int upper_parent(void)
{
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	pid_t middle = in_child(between_parents);
	await(MIDDLE_ENDS);
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 0));
	told[0] = 1;
	MUST(waitpid(middle, NULL, 0));
	MUST(setsid());
	come_to(UPPER);
	return stays();
}
static int top_of_both(void)
{
	MUST(setsid());
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	in_child(upper_parent);
	return stays();
}
static void orphan_of_former_subreaper_setup(void)
{
	share();
	dead[0] = in_child(top_of_both);
	await(UPPER);
	await(LOWER);
	remember(dead[0]);
	remember(told[UPPER]);
	remember(told[LOWER]);
	remember(told[MEMBER]);
	remember(told[ORPHAN]);
}
static void orphan_of_former_subreaper_check(void)
{
	CHECK(places[1].parent == dead[0] && places[2].parent == dead[0], "the setup failed: parents");
	CHECK(places[3].parent == told[LOWER] && places[4].parent == told[UPPER], "the setup failed: children");
	CHECK(places[3].session == places[4].session, "the setup failed: sessions");
	expect_places();
}
static void orphan_of_former_subreaper_spoil(void) { kill_one(told[UPPER]); }
STATE(orphan_of_former_subreaper)

static int two_sessions_of(int slot)
{
	told[slot] = in_child(stays);
	MUST(setsid());
	told[slot + 1] = getpid();
	return stays();
}
static int first_of_two(void) { return two_sessions_of(0); }
static int second_of_two(void) { return two_sessions_of(2); }
static int starts_both(void)
{
	MUST(setsid());
	in_child(first_of_two);
	in_child(second_of_two);
	await(1);
	await(3);
	return 0;
}
static void daemons_of_one_session_setup(void)
{
	share();
	dead[0] = in_child(starts_both);
	expect_exit(dead[0], 0);
	for (int i = 0; i < 4; i++)
		remember(told[i]);
}
static void daemons_of_one_session_check(void)
{
	CHECK(places[0].session == dead[0] && places[1].session == told[1] && places[1].parent == 1, "the setup failed");
	expect_places();
}
static void daemons_of_one_session_spoil(void)
{
	kill_one(told[0]);
	kill_one(told[1]);
}
STATE(daemons_of_one_session)

static int deep_body(void)
{
	int depth = ++told[0];
	told[depth] = getpid();
	if (depth < 100)
		in_child(deep_body);
	return stays();
}
static void deep_tree_setup(void)
{
	share();
	in_child(deep_body);
	await(100);
	usleep(20000);
}
static void deep_tree_check(void)
{
	for (int i = 2; i <= 100; i++)
		CHECK(stat_field(told[i], 4) == told[i - 1], "the parent of %d is %ld", told[i], stat_field(told[i], 4));
}
static void deep_tree_spoil(void) { kill_one(told[50]); }
STATE(deep_tree)

static void wide_tree_setup(void)
{
	for (int i = 0; i < 200; i++)
		dead[i] = in_child(sleeps);
}
static void wide_tree_check(void)
{
	for (int i = 0; i < 200; i++)
		expect_exit(dead[i], 0);
}
static void wide_tree_spoil(void) { MUST(waitpid(dead[100], NULL, 0)); }
STATE(wide_tree)

static void later_numbers_setup(void)
{
	for (int i = 0; i < 40; i++)
		expect_exit(in_child(code_body), 37);
	dead[0] = in_child(stays);
}
static void later_numbers_check(void)
{
	dead[1] = in_child(code_body);
	CHECK(dead[1] > dead[0], "the next number is %d, after %d", dead[1], dead[0]);
	expect_exit(dead[1], 37);
	CHECK(kill(dead[0], 0) == 0, "the child is gone");
}
static void later_numbers_spoil(void)
{
	kill_one(dead[0]);
	MUST(waitpid(dead[0], NULL, 0));
}
STATE(later_numbers)

static pid_t fork_as(pid_t number)
{
	struct {
		uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
	} arguments = {.exit_signal = SIGCHLD, .set_tid = (uint64_t)&number, .set_tid_size = 1};
	return (pid_t)MUST(syscall(SYS_clone3, &arguments, sizeof arguments));
}
static void numbers_with_gaps_setup(void)
{
	static const pid_t wanted[] = {30000, 500, 32766, 77, 12345};
	for (int i = 0; i < 5; i++)
		if (!(dead[i] = fork_as(wanted[i])))
			_exit(sleeps());
}
static void numbers_with_gaps_check(void)
{
	for (int i = 0; i < 5; i++)
		expect_exit(dead[i], 0);
}
static void numbers_with_gaps_spoil(void) { MUST(waitpid(dead[3], NULL, 0)); }
STATE(numbers_with_gaps, .privileged = true)

static pid_t low_tid;

static void *threads_own(void *unused)
{
	(void)unused;
	low_tid = (pid_t)syscall(SYS_gettid);
	until_finishing();
	return NULL;
}
static pthread_t threads[2];
/* A thread whose number lies between those of processes that were made before and after. */
static void thread_among_processes_setup(void)
{
	dead[0] = in_child(sleeps);
	MUST(pthread_create(&threads[0], NULL, threads_own, NULL) ? -1 : 0);
	while (!low_tid)
		usleep(1000);
	dead[1] = in_child(sleeps);
}
static void thread_among_processes_check(void)
{
	char path[64];
	CHECK(dead[0] < low_tid && low_tid < dead[1], "the setup failed");
	snprintf(path, sizeof path, "/proc/self/task/%d", low_tid);
	pthread_join(threads[0], NULL);
	expect_exit(dead[0], 0);
	expect_exit(dead[1], 0);
}
static void thread_among_processes_spoil(void) { MUST(waitpid(dead[1], NULL, 0)); }
STATE(thread_among_processes)

/* --- Groups --- */

static void group_without_leader_setup(void)
{
	dead[0] = in_child(stays);
	dead[1] = in_child(stays);
	dead[2] = in_child(stays);
	MUST(setpgid(dead[0], dead[0]));
	MUST(setpgid(dead[1], dead[0]));
	MUST(setpgid(dead[2], dead[0]));
	MUST(kill(dead[0], SIGKILL));
	MUST(waitpid(dead[0], NULL, 0));
	remember(dead[1]);
	remember(dead[2]);
}
static void group_without_leader_check(void)
{
	CHECK(places[0].group == dead[0], "the setup failed");
	expect_places();
	CHECK(kill(-dead[0], SIGKILL) == 0, "the group gets no signals");
	MUST(waitpid(dead[1], NULL, 0));
	MUST(waitpid(dead[2], NULL, 0));
}
static void group_without_leader_spoil(void) { MUST(setpgid(dead[2], dead[2])); }
STATE(group_without_leader)

static void group_left_by_leader_setup(void)
{
	dead[0] = in_child(stays);
	dead[1] = in_child(stays);
	MUST(setpgid(dead[0], dead[0]));
	MUST(setpgid(dead[1], dead[0]));
	MUST(setpgid(dead[0], 1));
	remember(dead[0]);
	remember(dead[1]);
}
static void group_left_by_leader_check(void)
{
	CHECK(places[0].group == 1 && places[1].group == dead[0], "the setup failed");
	expect_places();
}
static void group_left_by_leader_spoil(void) { MUST(setpgid(dead[1], 1)); }
STATE(group_left_by_leader)

static void groups_exchanged_setup(void)
{
	for (int i = 0; i < 3; i++)
		dead[i] = in_child(stays);
	MUST(setpgid(dead[0], dead[0]));
	MUST(setpgid(dead[1], dead[1]));
	MUST(setpgid(dead[2], dead[0]));
	MUST(setpgid(dead[0], dead[1]));
	MUST(setpgid(dead[1], dead[0]));
	for (int i = 0; i < 3; i++)
		remember(dead[i]);
}
static void groups_exchanged_check(void)
{
	CHECK(places[0].group == dead[1] && places[1].group == dead[0], "the setup failed");
	expect_places();
}
static void groups_exchanged_spoil(void) { MUST(setpgid(dead[1], dead[1])); }
STATE(groups_exchanged)

static void group_of_zombie_setup(void)
{
	dead[0] = in_child(stays);
	dead[1] = in_child(stays);
	MUST(setpgid(dead[0], dead[0]));
	MUST(setpgid(dead[1], dead[0]));
	MUST(kill(dead[0], SIGTERM));
	await_state(dead[0], 'Z');
	remember(dead[0]);
	remember(dead[1]);
}
static void group_of_zombie_check(void)
{
	expect_places();
	int status;
	CHECK(waitpid(-dead[0], &status, 0) == dead[0] && status == SIGTERM, "the group has no such zombie");
}
static void group_of_zombie_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(group_of_zombie)

/* --- The stopped --- */

static int ticks(void)
{
	while (getppid() >= 0) {
		told[0]++;
		usleep(1000);
	}
	return 0;
}

static void stop_with(int signal)
{
	share();
	dead[0] = in_child(ticks);
	await(0);
	MUST(setpgid(dead[0], dead[0]));
	MUST(kill(dead[0], signal));
	await_state(dead[0], 'T');
}

static void expect_still(void)
{
	CHECK(stat_field(dead[0], 3) == 'T', "its state is %c", (int)stat_field(dead[0], 3));
	pid_t before = told[0];
	usleep(30000);
	CHECK(told[0] == before, "it runs");
}

static void expect_goes_on(void)
{
	MUST(kill(dead[0], SIGCONT));
	pid_t before = told[0];
	for (int i = 0; told[0] == before; i++) {
		CHECK(i < 5000, "it does not go on");
		usleep(1000);
	}
	MUST(kill(dead[0], SIGKILL));
	MUST(waitpid(dead[0], NULL, 0));
}

static void expect_stop_report(int signal)
{
	int status;
	CHECK(waitpid(dead[0], &status, WUNTRACED | WNOHANG) == dead[0], "the stop is not reported");
	CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == signal, "the stop is reported as %#x", status);
}

static void stopped_unreported_setup(void) { stop_with(SIGSTOP); }
static void stopped_unreported_check(void)
{
	expect_still();
	expect_stop_report(SIGSTOP);
	expect_goes_on();
}
static void stopped_unreported_spoil(void) { MUST(waitpid(dead[0], NULL, WUNTRACED)); }
STATE(stopped_unreported)

static void stopped_reported_setup(void)
{
	stop_with(SIGSTOP);
	MUST(waitpid(dead[0], NULL, WUNTRACED));
}
static void stopped_reported_check(void)
{
	int status;
	expect_still();
	CHECK(waitpid(dead[0], &status, WUNTRACED | WNOHANG) == 0, "the stop is reported again");
	expect_goes_on();
}
static void stopped_reported_spoil(void) { MUST(kill(dead[0], SIGCONT)); }
STATE(stopped_reported)

#define STOPPED_BY(name, signal) \
	static void name##_setup(void) { stop_with(signal); } \
	static void name##_check(void) \
	{ \
		expect_still(); \
		expect_stop_report(signal); \
		expect_goes_on(); \
	} \
	static void name##_spoil(void) { MUST(kill(dead[0], SIGCONT)); } \
	STATE(name)
STOPPED_BY(stopped_by_tstp, SIGTSTP)
STOPPED_BY(stopped_by_ttin, SIGTTIN)
STOPPED_BY(stopped_by_ttou, SIGTTOU)

static void *ticks_in_thread(void *slot)
{
	for (;;) {
		told[(intptr_t)slot]++;
		usleep(1000);
	}
	return NULL;
}
static int many_ticks(void)
{
	pthread_t thread;
	for (intptr_t i = 1; i < 5; i++)
		pthread_create(&thread, NULL, ticks_in_thread, (void *)i);
	return ticks();
}
static void stopped_threads_setup(void)
{
	share();
	dead[0] = in_child(many_ticks);
	for (int i = 0; i < 5; i++)
		await(i);
	MUST(kill(dead[0], SIGSTOP));
	await_state(dead[0], 'T');
	usleep(20000);
}
static void stopped_threads_check(void)
{
	pid_t before[5];
	memcpy(before, (void *)told, sizeof before);
	expect_still();
	CHECK(!memcmp(before, (void *)told, sizeof before), "a thread runs");
	expect_stop_report(SIGSTOP);
	MUST(kill(dead[0], SIGCONT));
	for (int i = 0; i < 5; i++)
		for (int t = 0; told[i] == before[i]; t++) {
			CHECK(t < 5000, "thread %d does not go on", i);
			usleep(1000);
		}
	MUST(kill(dead[0], SIGKILL));
	MUST(waitpid(dead[0], NULL, 0));
}
static void stopped_threads_spoil(void) { MUST(kill(dead[0], SIGCONT)); }
STATE(stopped_threads)

static void stopped_with_others_dead_setup(void)
{
	stop_with(SIGSTOP);
	dead[1] = in_child(stays);
	MUST(setpgid(dead[1], dead[0]));
	MUST(kill(dead[1], SIGKILL));
	await_state(dead[1], 'Z');
}
/* The end of the one must not hang up the other. */
static void stopped_with_others_dead_check(void)
{
	expect_still();
	int status;
	CHECK(waitpid(dead[1], &status, 0) == dead[1] && status == SIGKILL, "the status is %#x", status);
	expect_stop_report(SIGSTOP);
	expect_goes_on();
}
static void stopped_with_others_dead_spoil(void) { MUST(kill(dead[0], SIGCONT)); }
STATE(stopped_with_others_dead)

static void continued_unreported_setup(void)
{
	stop_with(SIGSTOP);
	MUST(waitpid(dead[0], NULL, WUNTRACED));
	MUST(kill(dead[0], SIGCONT));
	siginfo_t info;
	do
		info.si_pid = 0;
	while (!waitid(P_PID, (id_t)dead[0], &info, WCONTINUED | WNOHANG | WNOWAIT) && !info.si_pid);
}
static void continued_unreported_check(void)
{
	int status;
	CHECK(waitpid(dead[0], &status, WCONTINUED | WNOHANG) == dead[0] && WIFCONTINUED(status), "nobody says that it goes on");
	CHECK(waitpid(dead[0], &status, WCONTINUED | WNOHANG) == 0, "it is said twice");
	expect_goes_on();
}
static void continued_unreported_spoil(void) { MUST(waitpid(dead[0], NULL, WCONTINUED)); }
STATE(continued_unreported)

static void continued_reported_setup(void)
{
	continued_unreported_setup();
	MUST(waitpid(dead[0], NULL, WCONTINUED));
}
static void continued_reported_check(void)
{
	int status;
	CHECK(waitpid(dead[0], &status, WCONTINUED | WUNTRACED | WNOHANG) == 0, "it is said again that it goes on");
	expect_goes_on();
}
static void continued_reported_spoil(void)
{
	MUST(kill(dead[0], SIGSTOP));
	await_state(dead[0], 'T');
}
STATE(continued_reported)

/* --- Threads and the tree --- */

static void *child_maker(void *unused)
{
	(void)unused;
	dead[0] = in_child(sleeps);
	return NULL;
}
static void child_of_ended_thread_setup(void)
{
	MUST(pthread_create(&threads[0], NULL, child_maker, NULL) ? -1 : 0);
	pthread_join(threads[0], NULL);
}
static void child_of_ended_thread_check(void) { expect_exit(dead[0], 0); }
static void child_of_ended_thread_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(child_of_ended_thread)

static void *survives(void *unused)
{
	(void)unused;
	told[0] = 1;
	until_finishing();
	exit(21);
}
static int leader_ends(void)
{
	pthread_t thread;
	pthread_create(&thread, NULL, survives, NULL);
	await(0);
	pthread_exit(NULL);
}
static void leader_thread_ended_setup(void)
{
	share();
	dead[0] = in_child(leader_ends);
	await(0);
	await_state(dead[0], 'Z');
}
static void leader_thread_ended_check(void) { expect_exit(dead[0], 21); }
static void leader_thread_ended_spoil(void) { MUST(waitpid(dead[0], NULL, 0)); }
STATE(leader_thread_ended, .refused = "first thread")
