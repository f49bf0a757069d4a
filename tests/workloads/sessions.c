/*
 * A tree of processes with ids, sessions and groups of their own: a session leader with two groups, an orphan that init took
 * over, a child that waits stopped, zombies that nobody has asked for yet, a child that ends after its parent's parent. Each
 * living one looks at its own ids all the time and counts; the first sees that all of them count.
 */
#include "workload.h"
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { MAIN, LEADER, MEMBER, SECOND_GROUP, ORPHAN, STOPPED, SUBREAPED, MEMBERS };
static const char *const names[MEMBERS] = {"main", "leader", "member", "second-group", "orphan", "stopped", "subreaped"};

static struct { struct { _Atomic pid_t pid, parent, group, session; _Atomic uint64_t counted; } of[MEMBERS]; _Atomic bool stop; } *board;

static void stands(int who)
{
	board->of[who].parent = getppid();
	board->of[who].group = getpgid(0);
	board->of[who].session = getsid(0);
	board->of[who].pid = getpid();
	prctl(PR_SET_NAME, names[who]);
}

static void looks(int who)
{
	struct { const char *what; pid_t now, then; } ids[] = {
		{"process id", getpid(), board->of[who].pid}, {"parent", getppid(), board->of[who].parent},
		{"process group", getpgid(0), board->of[who].group}, {"session", getsid(0), board->of[who].session}};
	for (int i = 0; i < 4; i++)
		CHECK(ids[i].now == ids[i].then, "%s: its %s is %d, was %d", names[who], ids[i].what, ids[i].now, ids[i].then);
	char name[16];
	prctl(PR_GET_NAME, name);
	CHECK(!strcmp(name, names[who]), "%s is called %s", names[who], name);
	board->of[who].counted++;
}

/* Until the end. One that finds a difference says so itself; its count then stands, which the first process sees. */
static void lives(int who)
{
	while (!board->stop) {
		looks(who);
		doze(5 * MS);
	}
	_exit(who + 10);
}

static void until(bool (*holds)(void), const char *what)
{
	int64_t end = now_ns() + 20 * SECOND;
	while (!holds()) {
		CHECK(now_ns() < end, "set-up failed: %s", what);
		doze(MS);
	}
}

static bool all_stand(void)
{
	for (int i = 0; i < MEMBERS; i++)
		if (board->of[i].pid == 0)
			return false;
	return true;
}

static char state_of(pid_t pid)
{
	char path[64], text[512];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return '-';
	ssize_t length = read(fd, text, sizeof text - 1);
	close(fd);
	text[length > 0 ? length : 0] = 0;
	char *after = strrchr(text, ')');
	return after ? after[2] : '-';
}

static bool stopped_stands(void) { return state_of(board->of[STOPPED].pid) == 'T'; }

/* Whether a wait for stopped children would report this one. */
static bool would_report(pid_t child)
{
	siginfo_t info = {0};
	MUST(waitid(P_PID, (id_t)child, &info, WSTOPPED | WNOHANG | WNOWAIT));
	return info.si_pid == child;
}

static volatile sig_atomic_t child_signals;
static void on_child(int signal) { (void)signal; child_signals++; }

static pid_t zombies[3];
static bool zombies_stand(void)
{
	return state_of(zombies[0]) == 'Z' && state_of(zombies[1]) == 'Z' && state_of(zombies[2]) == 'Z';
}

static int status_of(pid_t child)
{
	int status = 0;
	CHECK(waitpid(child, &status, 0) == child, "waitpid of %d", child);
	return status;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(board != MAP_FAILED, "set-up failed: mmap");
	stands(MAIN);

	pid_t leader = MUST(fork());
	if (leader == 0) {
		MUST(setsid());
		MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
		pid_t member = MUST(fork());
		if (member == 0) { stands(MEMBER); lives(MEMBER); }
		pid_t second = MUST(fork());
		if (second == 0) { MUST(setpgid(0, 0)); stands(SECOND_GROUP); lives(SECOND_GROUP); }
		/* A grandchild whose parent ends at once: it comes to the nearest subreaper. */
		pid_t between = MUST(fork());
		if (between == 0) {
			if (MUST(fork()) == 0) {
				while (getppid() != board->of[LEADER].pid)
					doze(MS);
				stands(SUBREAPED);
				lives(SUBREAPED);
			}
			_exit(0);
		}
		stands(LEADER);
		status_of(between);
		while (!board->stop) {
			int is;
			prctl(PR_GET_CHILD_SUBREAPER, &is);
			CHECK(is == 1, "the leader is no subreaper any more");
			looks(LEADER);
			doze(5 * MS);
		}
		CHECK(status_of(member) == (MEMBER + 10) << 8, "how the member ended");
		CHECK(status_of(second) == (SECOND_GROUP + 10) << 8, "how the second group ended");
		CHECK(status_of(board->of[SUBREAPED].pid) == (SUBREAPED + 10) << 8, "how the subreaped one ended");
		_exit(LEADER + 10);
	}

	pid_t between = MUST(fork());
	if (between == 0) {
		pid_t parent = getpid();
		if (MUST(fork()) == 0) {
			while (getppid() == parent)
				doze(MS);
			stands(ORPHAN);
			lives(ORPHAN);
		}
		_exit(0);
	}
	CHECK(status_of(between) == 0, "set-up failed: the orphan's parent");

	pid_t stopped = MUST(fork());
	if (stopped == 0) {
		stands(STOPPED);
		raise(SIGSTOP);
		looks(STOPPED);
		_exit(STOPPED + 10);
	}
	/* A second one, of which we know. */
	pid_t known = MUST(fork());
	if (known == 0) {
		raise(SIGSTOP);
		_exit(60);
	}
	int known_status = 0;
	CHECK(waitpid(known, &known_status, WUNTRACED) == known && WIFSTOPPED(known_status), "set-up failed: nobody stopped");
	for (int i = 0; i < 3; i++) {
		zombies[i] = MUST(fork());
		if (zombies[i] == 0) {
			if (i == 2)
				kill(getpid(), SIGKILL);
			_exit(40 + i);
		}
	}
	until(all_stand, "not every process stands");
	until(stopped_stands, "nobody stopped");
	until(zombies_stand, "no zombies");
	struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
	MUST(sigaction(SIGCHLD, &action, NULL));
	ready();

	uint64_t seen[MEMBERS] = {0};
	int64_t counted_ns = now_ns();
	while (goes_on()) {
		doze(20 * MS);
		if (breaking("group")) setpgid(0, board->of[LEADER].pid == 0), board->of[MAIN].group++;
		if (breaking("stopped")) kill(stopped, SIGKILL), doze(20 * MS);
		if (breaking("zombie")) status_of(zombies[1]);
		if (breaking("member")) kill(board->of[MEMBER].pid, SIGKILL);
		looks(MAIN);
		CHECK(state_of(stopped) == 'T', "the stopped child is in state %c", state_of(stopped));
		CHECK(state_of(known) == 'T', "the second stopped child is in state %c", state_of(known));
		CHECK(would_report(stopped), "the stop of a child is reported no more");
		CHECK(!would_report(known), "the stop of a child is reported a second time");
		CHECK(child_signals == 0, "a signal came for a child to which nothing happened");
		for (int i = 0; i < 3; i++)
			CHECK(state_of(zombies[i]) == 'Z', "zombie %d is in state %c", i, state_of(zombies[i]));
		bool all = true;
		for (int i = 0; i < MEMBERS; i++)
			all &= i == STOPPED || board->of[i].counted != seen[i];
		if (all) {
			counted_ns = now_ns();
			for (int i = 0; i < MEMBERS; i++)
				seen[i] = board->of[i].counted;
		}
		CHECK(now_ns() - counted_ns < late_ms * MS, "one of the processes no longer counts");
	}
	kill(known, SIGCONT);
	CHECK(status_of(known) == 60 << 8, "how the second stopped child ended");
	kill(stopped, SIGCONT);
	CHECK(status_of(stopped) == (STOPPED + 10) << 8, "how the stopped child ended");
	CHECK(status_of(zombies[0]) == 40 << 8 && status_of(zombies[1]) == 41 << 8, "exit status of a zombie");
	CHECK((status_of(zombies[2]) & 0x7f) == SIGKILL, "a zombie that was killed");
	board->stop = true;
	CHECK(status_of(leader) == (LEADER + 10) << 8, "how the leader ended");
	if (getpid() == 1)
		CHECK(status_of(board->of[ORPHAN].pid) == (ORPHAN + 10) << 8, "how the orphan ended");
	CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "a child is there that nobody made");
	return finished("processes=%d", MEMBERS + 4);
}
