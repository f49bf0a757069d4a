/* The container's own terminal: its master is outside. */
#include "state.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <asm/termbits.h>

static struct termios2 get(int fd)
{
	struct termios2 settings;
	MUST(ioctl(fd, TCGETS2, &settings));
	return settings;
}

static void set(int fd, struct termios2 settings) { MUST(ioctl(fd, TCSETS2, &settings)); }

static void change(unsigned on, unsigned off)
{
	struct termios2 s = get(0);
	s.c_lflag = (s.c_lflag | on) & ~off;
	set(0, s);
}

/* As if somebody had typed it. */
static void type(const char *text)
{
	for (; *text; text++)
		MUST(ioctl(0, TIOCSTI, text));
}

static void expect_read(const char *text)
{
	char buffer[8192];
	struct pollfd p = {.fd = 0, .events = POLLIN};
	CHECK(MUST(poll(&p, 1, 1000)) == 1, "nothing came, not %s", text);
	ssize_t count = MUST(read(0, buffer, sizeof buffer));
	CHECK((size_t)count == strlen(text) && !memcmp(buffer, text, strlen(text)), "a read returned %zd bytes: %.*s", count, (int)count, buffer);
}

static void expect_nothing(void)
{
	struct pollfd p = {.fd = 0, .events = POLLIN};
	CHECK(MUST(poll(&p, 1, 0)) == 0, "there is more to read");
}

static unsigned device(int fd)
{
	unsigned device;
	MUST(ioctl(fd, TIOCGDEV, &device));
	return device;
}

static void is_controlled(void)
{
	int group, session;
	MUST(ioctl(0, TIOCGPGRP, &group));
	MUST(ioctl(0, TIOCGSID, &session));
	CHECK(session == 1, "its session is %d", session);
	CHECK(group == getpgrp(), "the group %d is in the foreground", group);
	int fd = MUST(open("/dev/tty", O_RDWR));
	CHECK(device(fd) == device(0), "/dev/tty is another");
	close(fd);
}

static struct termios2 wanted;

static void terminal_plain_setup(void) { wanted = get(0); }
static void terminal_plain_check(void)
{
	struct termios2 now = get(0);
	char name[64] = "";
	CHECK(!memcmp(&now, &wanted, sizeof now), "the settings are others");
	is_controlled();
	CHECK(isatty(0) && isatty(1) && isatty(2), "a standard stream is no terminal");
	MUST(ttyname_r(0, name, sizeof name) ? -1 : 0);
	CHECK(!strcmp(name, "/dev/pts/0"), "its name is %s", name);
}
static void terminal_plain_spoil(void) { change(0, ECHO); }
STATE(terminal_plain, .terminal = true)

static void terminal_settings_setup(void)
{
	struct termios2 s = get(0);
	s.c_iflag = IXON | IXANY | IUTF8 | INLCR;
	s.c_oflag = OPOST | ONLCR | XTABS;
	s.c_lflag = ICANON | ECHONL | TOSTOP | NOFLSH;
	s.c_cflag = (s.c_cflag & ~(unsigned)CBAUD) | BOTHER | CLOCAL;
	s.c_ospeed = s.c_ispeed = 31250;
	for (unsigned i = 0; i < NCCS; i++)
		s.c_cc[i] = (cc_t)(200 + i);
	set(0, s);
	wanted = get(0);
}
static void terminal_settings_check(void)
{
	struct termios2 now = get(0);
	CHECK(!memcmp(&now, &wanted, sizeof now), "the settings are others");
}
static void terminal_settings_spoil(void) { change(ECHO, 0); }
STATE(terminal_settings, .terminal = true)

static void terminal_raw_setup(void)
{
	struct termios2 s = get(0);
	s.c_iflag = s.c_oflag = s.c_lflag = 0;
	s.c_cc[VMIN] = 1;
	s.c_cc[VTIME] = 0;
	set(0, s);
	type("raw\n\x03\x04");
	wanted = get(0);
}
static void terminal_raw_check(void) { terminal_settings_check(); expect_read("raw\n\x03\x04"); expect_nothing(); }
static void terminal_raw_spoil(void) { type("x"); }
STATE(terminal_raw, .terminal = true)

static void terminal_size_setup(void) { MUST(ioctl(0, TIOCSWINSZ, &(struct winsize){.ws_row = 41, .ws_col = 123, .ws_xpixel = 4, .ws_ypixel = 5})); }
static void terminal_size_check(void)
{
	struct winsize size;
	MUST(ioctl(1, TIOCGWINSZ, &size));
	CHECK(size.ws_row == 41 && size.ws_col == 123 && size.ws_xpixel == 4 && size.ws_ypixel == 5, "the size is %d x %d", size.ws_row, size.ws_col);
}
static void terminal_size_spoil(void) { MUST(ioctl(0, TIOCSWINSZ, &(struct winsize){.ws_row = 1, .ws_col = 1})); }
STATE(terminal_size, .terminal = true)

static void terminal_lines_setup(void) { change(0, ECHO); type("typed\nahead\n"); }
static void terminal_lines_check(void) { expect_read("typed\n"); expect_read("ahead\n"); expect_nothing(); }
static void terminal_lines_spoil(void) { expect_read("typed\n"); }
STATE(terminal_lines, .terminal = true)

static void terminal_unfinished_line_setup(void) { change(0, ECHO); type("whole\nhal"); }
static void terminal_unfinished_line_check(void) { expect_read("whole\n"); expect_nothing(); type("\x7f\x7funt\n"); expect_read("hunt\n"); }
static void terminal_unfinished_line_spoil(void) { type("x"); }
STATE(terminal_unfinished_line, .terminal = true)

static void terminal_end_of_file_setup(void) { change(0, ECHO); type("ab\x04\x04"); }
static void terminal_end_of_file_check(void) { expect_read("ab"); expect_read(""); expect_nothing(); }
static void terminal_end_of_file_spoil(void) { expect_read("ab"); }
STATE(terminal_end_of_file, .terminal = true)

static void terminal_much_input_setup(void)
{
	change(0, ECHO);
	for (int i = 0; i < 300; i++)
		type("0123456789\n");
}
static void terminal_much_input_check(void) { for (int i = 0; i < 300; i++) expect_read("0123456789\n"); expect_nothing(); }
static void terminal_much_input_spoil(void) { expect_read("0123456789\n"); }
STATE(terminal_much_input, .terminal = true, .refused = "more input waiting")

static int fds[4];

static void terminal_descriptions_setup(void)
{
	fds[0] = MUST(open("/dev/pts/0", O_RDONLY | O_NOCTTY | O_NONBLOCK));
	fds[1] = MUST(open("/dev/console", O_WRONLY | O_NOCTTY | O_APPEND));
	fds[2] = MUST(open("/dev/tty", O_RDWR | O_CLOEXEC));
	fds[3] = MUST(dup(fds[2]));
}
static const char *link_of(int fd)
{
	static char text[64];
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	text[MUST(readlink(path, text, sizeof text - 1))] = 0;
	return text;
}
static void terminal_descriptions_check(void)
{
	char byte;
	CHECK((MUST(fcntl(fds[0], F_GETFL)) & (O_ACCMODE | O_NONBLOCK)) == (O_RDONLY | O_NONBLOCK), "the first one's flags are others");
	CHECK((MUST(fcntl(fds[1], F_GETFL)) & (O_ACCMODE | O_NONBLOCK | O_APPEND)) == (O_WRONLY | O_APPEND), "the second one's flags are others");
	CHECK((MUST(fcntl(fds[2], F_GETFL)) & (O_ACCMODE | O_NONBLOCK)) == O_RDWR && MUST(fcntl(fds[2], F_GETFD)) == FD_CLOEXEC, "the third one's flags are others");
	CHECK(!(MUST(fcntl(0, F_GETFL)) & O_NONBLOCK), "standard input does not block");
	CHECK(read(fds[0], &byte, 1) == -1 && errno == EAGAIN, "the first one blocks");
	for (int i = 0; i < 4; i++)
		CHECK(device(fds[i]) == device(0), "descriptor %d is another terminal", fds[i]);
	CHECK(!strcmp(link_of(fds[1]), "/dev/console"), "the second one is %s", link_of(fds[1]));
	CHECK(!strcmp(link_of(fds[2]), "/dev/tty"), "the third one is %s", link_of(fds[2]));
	MUST(fcntl(fds[3], F_SETFL, O_RDWR | O_NONBLOCK));
	CHECK(MUST(fcntl(fds[2], F_GETFL)) & O_NONBLOCK, "duplicates are apart");
	MUST(fcntl(1, F_SETFL, O_RDWR | O_NONBLOCK));
	CHECK(MUST(fcntl(0, F_GETFL)) & O_NONBLOCK, "standard input and output are apart");
	MUST(fcntl(1, F_SETFL, O_RDWR));
}
static void terminal_descriptions_spoil(void) { MUST(fcntl(fds[0], F_SETFL, 0)); }
STATE(terminal_descriptions, .terminal = true)

static void terminal_nonblocking_setup(void) { MUST(fcntl(0, F_SETFL, O_RDWR | O_NONBLOCK)); }
static void terminal_nonblocking_check(void) { char byte; CHECK(read(0, &byte, 1) == -1 && errno == EAGAIN, "it blocks"); MUST(fcntl(1, F_SETFL, O_RDWR)); }
static void terminal_nonblocking_spoil(void) { type("\n"); }
STATE(terminal_nonblocking, .terminal = true)

static void terminal_reopened_setup(void) { int fd = MUST(open("/dev/tty", O_RDWR)); close(0); close(2); MUST(dup2(fd, 0)); close(fd); }
static void terminal_reopened_check(void)
{
	CHECK(fcntl(2, F_GETFD) == -1 && errno == EBADF, "standard error is open");
	CHECK(!strcmp(link_of(0), "/dev/tty"), "standard input is %s", link_of(0));
	is_controlled();
}
static void terminal_reopened_spoil(void) { MUST(dup2(1, 2)); }
STATE(terminal_reopened, .terminal = true)

static void terminal_owner_setup(void) { MUST(fchown(0, 1000, 7)); MUST(fchmod(0, 0640)); }
static void terminal_owner_check(void)
{
	struct stat s;
	MUST(stat("/dev/pts/0", &s));
	CHECK(s.st_uid == 1000 && s.st_gid == 7 && (s.st_mode & 07777) == 0640, "%d:%d %o", s.st_uid, s.st_gid, s.st_mode);
}
static void terminal_owner_spoil(void) { MUST(fchmod(0, 0600)); }
STATE(terminal_owner, .terminal = true)

static pid_t child;
static int told[2];

static int wait_told(void)
{
	char byte;
	while (read(told[0], &byte, 1) != 1)
		;
	return 0;
}

static int no_terminal_body(void)
{
	MUST(setsid());
	wait_told();
	int fd = open("/dev/tty", O_RDWR);
	return fd == -1 && errno == ENXIO ? 0 : 1;
}
static void terminal_other_session_setup(void) { MUST(pipe(told)); child = in_child(no_terminal_body); usleep(20000); }
static void terminal_other_session_check(void) { is_controlled(); MUST(write(told[1], "x", 1)); expect_exit(child, 0); }
static void terminal_other_session_spoil(void) { kill(child, SIGKILL); }
STATE(terminal_other_session, .terminal = true)

static int forever(void)
{
	while (pause())
		;
	return 0;
}
static int own_group_body(void) { setpgid(0, 0); return forever(); }

static void terminal_foreground_setup(void)
{
	signal(SIGTTOU, SIG_IGN);
	change(0, ECHO);
	child = in_child(own_group_body);
	setpgid(child, child);
	MUST(ioctl(0, TIOCSPGRP, &child));
}
static void terminal_foreground_check(void)
{
	int group;
	MUST(ioctl(0, TIOCGPGRP, &group));
	CHECK(group == child, "the group %d is in the foreground", group);
	type("\x03");
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGINT, "^C does not reach it");
}
static void terminal_foreground_spoil(void) { int group = getpgrp(); MUST(ioctl(0, TIOCSPGRP, &group)); kill(child, SIGKILL); }
STATE(terminal_foreground, .terminal = true)

static int background_body(void)
{
	setpgid(0, 0);
	char line[16];
	return read(0, line, sizeof line) == 6 && !memcmp(line, "hello\n", 6) ? 0 : 1;
}
static void terminal_background_setup(void)
{
	signal(SIGTTOU, SIG_IGN);
	change(0, ECHO);
	child = in_child(background_body);
	setpgid(child, child);
	usleep(50000);
	int status;
	CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGTTIN, "it is not stopped");
}
static void terminal_background_check(void)
{
	int status;
	is_controlled();
	CHECK(waitpid(child, &status, WUNTRACED | WNOHANG) == 0, "its stop is told again");
	MUST(ioctl(0, TIOCSPGRP, &child));
	type("hello\n");
	kill(child, SIGCONT);
	expect_exit(child, 0);
}
static void terminal_background_spoil(void) { kill(child, SIGKILL); }
STATE(terminal_background, .terminal = true)

static int suspended_body(void) { setpgid(0, 0); signal(SIGTSTP, SIG_DFL); return forever(); }
static void terminal_suspended_setup(void)
{
	signal(SIGTTOU, SIG_IGN);
	change(0, ECHO);
	child = in_child(suspended_body);
	setpgid(child, child);
	usleep(20000);
	MUST(ioctl(0, TIOCSPGRP, &child));
	type("\x1a");
	siginfo_t info;
	MUST(waitid(P_PID, (id_t)child, &info, WSTOPPED | WNOWAIT));
	int group = getpgrp();
	MUST(ioctl(0, TIOCSPGRP, &group));
}
static void terminal_suspended_check(void)
{
	int status;
	is_controlled();
	CHECK(waitpid(child, &status, WUNTRACED | WNOHANG) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGTSTP, "it is not stopped by SIGTSTP");
	kill(child, SIGCONT);
	CHECK(waitpid(child, &status, WCONTINUED) == child && WIFCONTINUED(status), "it does not go on");
}
static void terminal_suspended_spoil(void) { int status; waitpid(child, &status, WUNTRACED); }
STATE(terminal_suspended, .terminal = true)

static void terminal_given_up_setup(void) { signal(SIGHUP, SIG_IGN); MUST(ioctl(0, TIOCNOTTY)); }
static void terminal_given_up_check(void)
{
	CHECK(open("/dev/tty", O_RDWR) == -1 && errno == ENXIO, "it has a controlling terminal");
	MUST(ioctl(0, TIOCSCTTY, 0));
	is_controlled();
}
static void terminal_given_up_spoil(void) { MUST(ioctl(0, TIOCSCTTY, 0)); }
STATE(terminal_given_up, .terminal = true)

static int other_leader_body(void)
{
	MUST(setsid());
	MUST(ioctl(0, TIOCSCTTY, 0));
	wait_told();
	int session;
	MUST(ioctl(0, TIOCGSID, &session));
	return session == getpid() && open("/dev/tty", O_RDWR) != -1 ? 0 : 1;
}
static void terminal_of_a_child_setup(void)
{
	MUST(pipe(told));
	signal(SIGHUP, SIG_IGN);
	MUST(ioctl(0, TIOCNOTTY));
	child = in_child(other_leader_body);
	usleep(50000);
}
static void terminal_of_a_child_check(void)
{
	CHECK(open("/dev/tty", O_RDWR) == -1 && errno == ENXIO, "init has a controlling terminal");
	MUST(write(told[1], "x", 1));
	expect_exit(child, 0);
}
static void terminal_of_a_child_spoil(void) { kill(child, SIGKILL); usleep(20000); }
STATE(terminal_of_a_child, .terminal = true)

static int blocked_body(void)
{
	char line[16];
	return read(0, line, sizeof line) == 6 && !memcmp(line, "hello\n", 6) ? 0 : 1;
}
static void terminal_blocked_reader_setup(void) { change(0, ECHO); child = in_child(blocked_body); usleep(20000); }
static void terminal_blocked_reader_check(void) { type("hello\n"); expect_exit(child, 0); }
static void terminal_blocked_reader_spoil(void) { type("x"); }
STATE(terminal_blocked_reader, .terminal = true)

static void terminal_and_pty_setup(void)
{
	fds[0] = MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY));
	MUST(ioctl(fds[0], TIOCSPTLCK, &(int){0}));
	fds[1] = MUST(open("/dev/pts/1", O_RDWR | O_NOCTTY));
	MUST(write(fds[0], "inner\n", 6));
	change(0, ECHO);
	type("outer\n");
	usleep(20000);
}
static void terminal_and_pty_check(void)
{
	char buffer[16];
	CHECK(MUST(read(fds[1], buffer, sizeof buffer)) == 6 && !memcmp(buffer, "inner\n", 6), "the inner one has another line");
	expect_read("outer\n");
	is_controlled();
}
static void terminal_and_pty_spoil(void) { MUST(read(fds[1], (char[16]){0}, 2)); }
STATE(terminal_and_pty, .terminal = true)

static void terminal_not_mine_setup(void) {}
static void terminal_not_mine_check(void)
{
	CHECK(open("/dev/tty", O_RDWR) == -1 && errno == ENXIO, "there is a controlling terminal");
	CHECK(!isatty(0) && !isatty(1), "a standard stream is a terminal");
}
static void terminal_not_mine_spoil(void)
{
	int master = MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY));
	MUST(ioctl(master, TIOCSPTLCK, &(int){0}));
	MUST(open("/dev/pts/0", O_RDWR));
}
STATE(terminal_not_mine)
