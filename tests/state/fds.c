/* Descriptors of files: flags, names that changed, files without a name, O_PATH, many numbers. */
#include "state.h"

#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

static int fd, other;
static struct stat before;

static void write_file(const char *path, const char *text)
{
	int file = MUST(open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600));
	MUST(write(file, text, strlen(text)));
	close(file);
}

static bool reads(int file, off_t offset, const char *text)
{
	char buffer[256];
	ssize_t count = pread(file, buffer, sizeof buffer, offset);
	return count == (ssize_t)strlen(text) && !memcmp(buffer, text, (size_t)count);
}

/* Status flags and access modes. */

static int flags_of(int file) { return MUST(fcntl(file, F_GETFL)); }

static const int flag_sets[] = {
	O_RDONLY, O_WRONLY, O_RDWR, O_WRONLY | O_APPEND, O_RDWR | O_SYNC, O_RDWR | O_DSYNC, O_RDWR | O_NONBLOCK, O_RDONLY | O_NOATIME,
	O_RDWR | O_DIRECT, O_RDONLY | O_NOFOLLOW, O_RDWR | O_APPEND | O_NONBLOCK | O_NOATIME, 3 /* neither reads nor writes */,
};
#define FLAG_SETS (sizeof flag_sets / sizeof *flag_sets)
static int flag_fds[FLAG_SETS], flag_values[FLAG_SETS];

static void open_flags_setup(void)
{
	write_file("/tmp/flags", "text");
	for (size_t i = 0; i < FLAG_SETS; i++) {
		flag_fds[i] = MUST(open("/tmp/flags", flag_sets[i]));
		flag_values[i] = flags_of(flag_fds[i]);
	}
}
static void open_flags_check(void)
{
	for (size_t i = 0; i < FLAG_SETS; i++)
		CHECK(flags_of(flag_fds[i]) == flag_values[i], "flags %#o are %#o", flag_values[i], flags_of(flag_fds[i]));
}
static void open_flags_spoil(void) { MUST(fcntl(flag_fds[0], F_SETFL, O_NONBLOCK)); }
STATE(open_flags)

static int path_sets_fds[5];
static void path_handles_setup(void)
{
	write_file("/tmp/handle", "text");
	MUST(mkdir("/tmp/handle-dir", 0700));
	MUST(symlink("handle", "/tmp/handle-link"));
	MUST(mkfifo("/tmp/handle-fifo", 0600));
	path_sets_fds[0] = MUST(open("/tmp/handle", O_PATH));
	path_sets_fds[1] = MUST(open("/tmp/handle-dir", O_PATH | O_DIRECTORY));
	path_sets_fds[2] = MUST(open("/tmp/handle-link", O_PATH | O_NOFOLLOW));
	path_sets_fds[3] = MUST(open("/tmp/handle-fifo", O_PATH | O_CLOEXEC));
	path_sets_fds[4] = MUST(open("/dev/null", O_PATH));
}
static void path_handles_check(void)
{
	static const mode_t kinds[] = {S_IFREG, S_IFDIR, S_IFLNK, S_IFIFO, S_IFCHR};
	for (size_t i = 0; i < 5; i++) {
		struct stat now;
		MUST(fstat(path_sets_fds[i], &now));
		CHECK((now.st_mode & S_IFMT) == kinds[i], "handle %zu is of mode %#o", i, now.st_mode);
		CHECK(flags_of(path_sets_fds[i]) & O_PATH, "handle %zu is no handle", i);
	}
	CHECK(flags_of(path_sets_fds[2]) & O_NOFOLLOW && flags_of(path_sets_fds[1]) & O_DIRECTORY, "a handle has lost flags");
	CHECK(MUST(fcntl(path_sets_fds[3], F_GETFD)) == FD_CLOEXEC && MUST(fcntl(path_sets_fds[1], F_GETFD)) == 0, "close-on-exec");
	char target[16];
	CHECK(MUST(readlinkat(path_sets_fds[2], "", target, sizeof target)) == 6 && !memcmp(target, "handle", 6), "the link's target");
	int file = MUST(openat(path_sets_fds[1], "new", O_CREAT | O_WRONLY, 0600));
	close(file);
	MUST(access("/tmp/handle-dir/new", F_OK));
	CHECK(read(path_sets_fds[0], target, 1) == -1 && errno == EBADF, "a handle can be read");
}
static void path_handles_spoil(void) { path_sets_fds[2] = path_sets_fds[0]; }
STATE(path_handles)

static void path_handle_deleted_setup(void)
{
	write_file("/tmp/handle-gone", "still here");
	fd = MUST(open("/tmp/handle-gone", O_PATH));
	MUST(unlink("/tmp/handle-gone"));
}
static void path_handle_deleted_check(void)
{
	char link[64];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	CHECK(flags_of(fd) & O_PATH, "it is no handle");
	int file = MUST(open(link, O_RDONLY));
	CHECK(reads(file, 0, "still here"), "the content is another");
}
static void path_handle_deleted_spoil(void) { MUST(dup2(MUST(open("/tmp", O_PATH)), fd)); }
STATE(path_handle_deleted)

/* Names that changed after the file was opened. */

static void renamed_setup(void)
{
	write_file("/tmp/first-name", "0123456789");
	fd = MUST(open("/tmp/first-name", O_RDWR));
	MUST(lseek(fd, 5, SEEK_SET));
	MUST(rename("/tmp/first-name", "/tmp/second-name"));
}
static void renamed_check(void)
{
	MUST(write(fd, "x", 1));
	CHECK(!strcmp(content("/tmp/second-name"), "01234x6789"), "the file has %s", content("/tmp/second-name"));
}
static void renamed_spoil(void) { MUST(lseek(fd, 0, SEEK_SET)); }
STATE(renamed)

static void linked_elsewhere_setup(void)
{
	MUST(mkdir("/root/deep", 0700));
	MUST(mkdir("/root/deep/er", 0700));
	write_file("/tmp/opened-name", "linked");
	fd = MUST(open("/tmp/opened-name", O_RDWR | O_APPEND));
	MUST(link("/tmp/opened-name", "/root/deep/er/name"));
	MUST(unlink("/tmp/opened-name"));
}
static void linked_elsewhere_check(void)
{
	MUST(write(fd, "!", 1));
	CHECK(!strcmp(content("/root/deep/er/name"), "linked!"), "the other name has %s", content("/root/deep/er/name"));
}
static void linked_elsewhere_spoil(void) { MUST(dup2(MUST(open("/tmp", O_RDWR | O_TMPFILE, 0600)), fd)); }
STATE(linked_elsewhere)

static void linked_and_replaced_setup(void)
{
	write_file("/tmp/taken-name", "old");
	fd = MUST(open("/tmp/taken-name", O_RDONLY));
	MUST(link("/tmp/taken-name", "/tmp/kept-name"));
	write_file("/tmp/new-file", "new");
	MUST(rename("/tmp/new-file", "/tmp/taken-name"));
}
static void linked_and_replaced_check(void)
{
	CHECK(reads(fd, 0, "old"), "the descriptor reads another file");
	CHECK(!strcmp(content("/tmp/taken-name"), "new"), "the name leads to another file");
	struct stat a, b;
	MUST(fstat(fd, &a));
	MUST(stat("/tmp/kept-name", &b));
	CHECK(a.st_ino == b.st_ino, "the descriptor is not for the kept name");
}
static void linked_and_replaced_spoil(void) { MUST(dup2(MUST(open("/tmp/taken-name", O_RDONLY)), fd)); }
STATE(linked_and_replaced)

static void replaced_setup(void)
{
	write_file("/tmp/replaced", "old");
	fd = MUST(open("/tmp/replaced", O_RDWR));
	write_file("/tmp/replacing", "new");
	MUST(rename("/tmp/replacing", "/tmp/replaced"));
	other = MUST(open("/tmp/replaced", O_RDWR));
}
static void replaced_check(void)
{
	CHECK(reads(fd, 0, "old") && reads(other, 0, "new"), "one of the files is another");
	MUST(fstat(fd, &before));
	CHECK(before.st_nlink == 0, "the old file has a name");
}
static void replaced_spoil(void) { MUST(dup2(other, fd)); }
STATE(replaced)

/* Files without a name. */

static void tmpfile_linkable_setup(void)
{
	fd = MUST(open("/tmp", O_RDWR | O_TMPFILE, 0640));
	MUST(write(fd, "to be linked", 12));
}
static void tmpfile_linkable_check(void)
{
	char link[64];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	MUST(linkat(AT_FDCWD, link, AT_FDCWD, "/tmp/linked-later", AT_SYMLINK_FOLLOW));
	CHECK(!strcmp(content("/tmp/linked-later"), "to be linked"), "the content is another");
	MUST(stat("/tmp/linked-later", &before));
	CHECK((before.st_mode & 07777) == 0640, "the mode is %#o", before.st_mode);
}
static void tmpfile_linkable_spoil(void) { MUST(ftruncate(fd, 3)); }
STATE(tmpfile_linkable)

static void tmpfile_linked_setup(void)
{
	tmpfile_linkable_setup();
	char link[64];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	MUST(linkat(AT_FDCWD, link, AT_FDCWD, "/tmp/linked-before", AT_SYMLINK_FOLLOW));
}
static void tmpfile_linked_check(void)
{
	MUST(write(fd, "!", 1));
	CHECK(!strcmp(content("/tmp/linked-before"), "to be linked!"), "the content is another");
}
static void tmpfile_linked_spoil(void) { MUST(lseek(fd, 0, SEEK_SET)); }
STATE(tmpfile_linked)

static int deleted_child_pipe[2];
static pid_t deleted_child;
static char *deleted_view;
static int deleted_body(void)
{
	char byte;
	MUST(read(deleted_child_pipe[0], &byte, 1));
	return lseek(fd, 0, SEEK_CUR) == (1 << 20) + 4 && deleted_view[0] == 'm' ? 0 : 1;
}
static void deleted_shared_setup(void)
{
	fd = MUST(open("/tmp/deleted-shared", O_RDWR | O_CREAT, 0600));
	other = MUST(open("/tmp/deleted-shared", O_RDONLY));
	MUST(unlink("/tmp/deleted-shared"));
	MUST(pwrite(fd, "start", 5, 0));
	MUST(lseek(fd, 1 << 20, SEEK_SET));
	MUST(write(fd, "end", 3));
	MUST(lseek(other, 2, SEEK_SET));
	deleted_view = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(deleted_view != MAP_FAILED, "mmap");
	MUST(pipe(deleted_child_pipe));
	deleted_child = in_child(deleted_body);
}
static void deleted_shared_check(void)
{
	struct stat now;
	char text[4] = "";
	CHECK(read(other, text, 3) == 3 && !memcmp(text, "art", 3), "read %s", text);
	deleted_view[0] = 'm';
	CHECK(reads(other, 0, "mtart") || (pread(other, text, 1, 0) == 1 && text[0] == 'm'), "the mapping is of another file");
	MUST(write(fd, "!", 1));
	MUST(fstat(other, &now));
	CHECK(now.st_size == (1 << 20) + 4, "the size is %ld", (long)now.st_size);
	CHECK(now.st_blocks * 512 < 1 << 19, "the hole was filled: %ld blocks", (long)now.st_blocks);
	MUST(write(deleted_child_pipe[1], "x", 1));
	expect_exit(deleted_child, 0);
}
static void deleted_shared_spoil(void) { MUST(lseek(other, 0, SEEK_SET)); }
STATE(deleted_shared)

static void deleted_attributes_setup(void)
{
	fd = MUST(open("/dev/shm/deleted-attributes", O_RDWR | O_CREAT, 0600));
	MUST(write(fd, "x", 1));
	MUST(fchown(fd, 1000, 7));
	MUST(fchmod(fd, 04751));
	struct timespec times[2] = {{.tv_sec = 1000000000, .tv_nsec = 123456789}, {.tv_sec = 1100000000, .tv_nsec = 987654321}};
	MUST(futimens(fd, times));
	MUST(unlink("/dev/shm/deleted-attributes"));
}
static void deleted_attributes_check(void)
{
	struct stat now;
	MUST(fstat(fd, &now));
	CHECK(now.st_uid == 1000 && now.st_gid == 7 && (now.st_mode & 07777) == 04751, "owner or mode");
	CHECK(now.st_atim.tv_sec == 1000000000 && now.st_atim.tv_nsec == 123456789, "access time %ld", (long)now.st_atim.tv_sec);
	CHECK(now.st_mtim.tv_sec == 1100000000 && now.st_mtim.tv_nsec == 987654321, "modification time");
}
static void deleted_attributes_spoil(void) { MUST(fchmod(fd, 0600)); }
STATE(deleted_attributes)

static void deleted_xattr_setup(void)
{
	fd = MUST(open("/tmp/deleted-xattr", O_RDWR | O_CREAT, 0600));
	MUST(fsetxattr(fd, "user.colour", "blue", 4, 0));
	MUST(unlink("/tmp/deleted-xattr"));
}
static void deleted_xattr_check(void)
{
	char value[8];
	CHECK(fgetxattr(fd, "user.colour", value, sizeof value) == 4 && !memcmp(value, "blue", 4), "the attribute is lost");
}
static void deleted_xattr_spoil(void) { MUST(fremovexattr(fd, "user.colour")); }
STATE(deleted_xattr)

static void deleted_fifo_setup(void)
{
	MUST(mkfifo("/tmp/deleted-fifo", 0640));
	fd = MUST(open("/tmp/deleted-fifo", O_RDWR));
	other = MUST(open("/tmp/deleted-fifo", O_RDONLY | O_NONBLOCK));
	MUST(unlink("/tmp/deleted-fifo"));
	MUST(write(fd, "in flight", 9));
}
static void deleted_fifo_check(void)
{
	char text[16];
	struct stat now;
	CHECK(read(other, text, sizeof text) == 9 && !memcmp(text, "in flight", 9), "the content is another");
	CHECK(read(other, text, sizeof text) == -1 && errno == EAGAIN, "more than was written");
	MUST(write(fd, "x", 1));
	CHECK(read(other, text, sizeof text) == 1, "the ends are not one FIFO's");
	MUST(fstat(fd, &now));
	CHECK(S_ISFIFO(now.st_mode) && (now.st_mode & 0777) == 0640 && now.st_nlink == 0, "mode %#o", now.st_mode);
}
static void deleted_fifo_spoil(void) { MUST(write(fd, "more", 4)); }
STATE(deleted_fifo)

static void deleted_directory_setup(void)
{
	MUST(mkdir("/tmp/deleted-dir", 0711));
	MUST(mkdir("/tmp/deleted-dir/inner", 0751));
	fd = MUST(open("/tmp/deleted-dir/inner", O_RDONLY | O_DIRECTORY));
	MUST(chdir("/tmp/deleted-dir/inner"));
	MUST(rmdir("/tmp/deleted-dir/inner"));
	other = MUST(open("/tmp/deleted-dir", O_PATH));
	MUST(rmdir("/tmp/deleted-dir"));
}
static void deleted_directory_check(void)
{
	struct stat a, b;
	MUST(fstat(fd, &a));
	MUST(stat(".", &b));
	CHECK(a.st_nlink == 0 && b.st_nlink == 0, "a deleted directory has a name");
	CHECK(a.st_ino == b.st_ino, "the working directory is another than the descriptor's");
	CHECK((a.st_mode & 0777) == 0751, "the mode is %#o", a.st_mode);
	CHECK(open("new", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT, "something can be made in a deleted directory");
	MUST(fstat(other, &b));
	CHECK(S_ISDIR(b.st_mode) && (b.st_mode & 0777) == 0711 && b.st_nlink == 0, "the outer one has mode %#o", b.st_mode);
	MUST(fstatat(fd, "..", &a, 0));
	CHECK(a.st_ino == b.st_ino, "the outer one is not the inner one's parent");
	CHECK(access("/tmp/deleted-dir", F_OK) == -1, "the outer one is back");
	MUST(chdir("/"));
}
static void deleted_directory_spoil(void) { MUST(chdir("/tmp")); }
STATE(deleted_directory)

/* Files of other kinds without a name. */

static struct stat node_before[6];
static int nodes[6];
static void deleted_nodes_setup(void)
{
	MUST(mkdir("/tmp/nodes", 0755));
	MUST(symlink("/where/it/leads", "/tmp/nodes/link"));
	MUST(lchown("/tmp/nodes/link", 12, 34));
	MUST(mkfifo("/tmp/nodes/fifo", 0641));
	MUST(mknod("/tmp/nodes/socket", S_IFSOCK | 0642, 0));
	MUST(mknod("/tmp/nodes/device", S_IFCHR | 0700, makedev(1, 3)));
	nodes[0] = MUST(open("/tmp/nodes/link", O_PATH | O_NOFOLLOW));
	nodes[1] = MUST(open("/tmp/nodes/fifo", O_PATH));
	nodes[2] = MUST(open("/tmp/nodes/socket", O_PATH | O_CLOEXEC));
	nodes[3] = MUST(open("/tmp/nodes/device", O_PATH | O_NOFOLLOW));
	nodes[4] = MUST(open("/tmp/nodes/device", O_RDWR | O_NONBLOCK));
	nodes[5] = MUST(open("/tmp/nodes/device", O_WRONLY));
	struct timespec times[2] = {{.tv_sec = 1000000000, .tv_nsec = 5}, {.tv_sec = 1100000000, .tv_nsec = 6}};
	MUST(utimensat(AT_FDCWD, "/tmp/nodes/link", times, AT_SYMLINK_NOFOLLOW));
	static const char *const names[] = {"link", "fifo", "socket", "device"};
	int directory = MUST(open("/tmp/nodes", O_DIRECTORY));
	for (int i = 0; i < 4; i++)
		MUST(unlinkat(directory, names[i], 0));
	close(directory);
	for (int i = 0; i < 6; i++)
		MUST(fstat(nodes[i], &node_before[i]));
	MUST(stat("/tmp/nodes", &before));
}
static void deleted_nodes_check(void)
{
	static const int flags[] = {O_PATH | O_NOFOLLOW, O_PATH, O_PATH, O_PATH | O_NOFOLLOW, O_RDWR | O_NONBLOCK, O_WRONLY};
	struct stat now;
	for (int i = 0; i < 6; i++) {
		MUST(fstat(nodes[i], &now));
		CHECK(now.st_mode == node_before[i].st_mode, "file %d has mode %#o", i, now.st_mode);
		CHECK(now.st_rdev == node_before[i].st_rdev && now.st_nlink == 0, "file %d is another device, or has a name", i);
		CHECK(now.st_uid == node_before[i].st_uid && now.st_gid == node_before[i].st_gid, "file %d has another owner", i);
		CHECK(now.st_mtim.tv_sec == node_before[i].st_mtim.tv_sec, "file %d has another time", i);
		CHECK((flags_of(nodes[i]) & (O_PATH | O_NOFOLLOW | O_ACCMODE | O_NONBLOCK)) == flags[i], "file %d has flags %#o", i, flags_of(nodes[i]));
	}
	char target[32];
	ssize_t count = MUST(readlinkat(nodes[0], "", target, sizeof target));
	CHECK(count == 15 && !memcmp(target, "/where/it/leads", 15), "the link leads to %.*s", (int)count, target);
	MUST(fstat(nodes[3], &now));
	ino_t inode = now.st_ino;
	MUST(fstat(nodes[5], &now));
	CHECK(now.st_ino == inode, "one device has become two");
	char byte;
	CHECK(read(nodes[4], &byte, 1) == 0 && write(nodes[5], "x", 1) == 1, "the device is not null");
	MUST(stat("/tmp/nodes", &now));
	CHECK(now.st_mtim.tv_nsec == before.st_mtim.tv_nsec, "the directory has changed");
	CHECK(rmdir("/tmp/nodes") == 0, "the directory is not empty");
}
static void deleted_nodes_spoil(void) { MUST(dup2(nodes[3], nodes[1])); }
STATE(deleted_nodes)

/* A handle on the node of something that is in use leads there. */
static void deleted_fifo_handle_setup(void)
{
	MUST(mkfifo("/tmp/used-fifo", 0600));
	other = MUST(open("/tmp/used-fifo", O_PATH));
	fd = MUST(open("/tmp/used-fifo", O_RDWR));
	MUST(unlink("/tmp/used-fifo"));
}
static void deleted_fifo_handle_check(void)
{
	char link[64], byte;
	snprintf(link, sizeof link, "/proc/self/fd/%d", other);
	MUST(write(fd, "x", 1));
	CHECK(read(MUST(open(link, O_RDONLY | O_NONBLOCK)), &byte, 1) == 1, "the handle is of another FIFO");
}
static void deleted_fifo_handle_spoil(void)
{
	MUST(mkfifo("/tmp/other-fifo", 0600));
	MUST(dup2(MUST(open("/tmp/other-fifo", O_PATH)), other));
}
STATE(deleted_fifo_handle, .refused = "a FIFO or socket without a name that is in use")

static void own_device_setup(void)
{
	MUST(mknod("/tmp/mine", S_IFCHR | 0600, makedev(1, 5)));
	fd = MUST(open("/tmp/mine", O_RDWR));
}
static void own_device_check(void)
{
	struct stat opened, named;
	MUST(fstat(fd, &opened));
	MUST(stat("/tmp/mine", &named));
	char byte = 'x';
	CHECK(opened.st_ino == named.st_ino && opened.st_rdev == makedev(1, 5), "another device is open");
	CHECK(read(fd, &byte, 1) == 1 && !byte, "it does not read zeros");
}
static void own_device_spoil(void) { MUST(dup2(MUST(open("/dev/zero", O_RDWR)), fd)); }
STATE(own_device)

/* What the kernel shows of files without a name. */

static void expect_shown(const char *link, const char *path)
{
	char shown[256];
	ssize_t count = MUST(readlink(link, shown, sizeof shown - 1));
	shown[count] = 0;
	CHECK(!strcmp(shown, path), "%s leads to %s, not to %s", link, shown, path);
}
static void expect_shown_descriptor(int file, const char *path)
{
	char link[64];
	snprintf(link, sizeof link, "/proc/self/fd/%d", file);
	expect_shown(link, path);
}

static int shown[6];
static void deleted_names_setup(void)
{
	MUST(mkdir("/tmp/names", 0755));
	write_file("/tmp/names/mapped", "mapped");
	write_file("/tmp/names/again", "old");
	shown[0] = MUST(open("/tmp/names/mapped", O_RDWR));
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, shown[0], 0) != MAP_FAILED, "no mapping");
	shown[1] = MUST(open("/tmp/names/again", O_RDWR));
	shown[2] = MUST(open("/tmp/names/#tag (deleted)", O_RDWR | O_CREAT, 0600));
	MUST(mkfifo("/tmp/names/fifo", 0600));
	shown[3] = MUST(open("/tmp/names/fifo", O_RDWR));
	MUST(mkdir("/tmp/names/inner", 0700));
	shown[4] = MUST(open("/tmp/names/inner", O_DIRECTORY));
	MUST(chdir("/tmp/names/inner"));
	shown[5] = MUST(open("/dev/shm/gone", O_RDWR | O_CREAT, 0600));
	MUST(unlink("/tmp/names/mapped"));
	MUST(unlink("/tmp/names/again"));
	MUST(unlink("/tmp/names/#tag (deleted)"));
	MUST(unlink("/tmp/names/fifo"));
	MUST(rmdir("/tmp/names/inner"));
	MUST(unlink("/dev/shm/gone"));
	/* This one's name is another file's by now. */
	write_file("/tmp/names/again", "new");
	struct timespec times[2] = {{.tv_sec = 1000000000}, {.tv_sec = 1100000000, .tv_nsec = 7}};
	MUST(utimensat(AT_FDCWD, "/tmp/names", times, 0));
}
static void deleted_names_check(void)
{
	expect_shown_descriptor(shown[0], "/tmp/names/mapped (deleted)");
	CHECK(strstr(content("/proc/self/maps"), " /tmp/names/mapped (deleted)\n"), "maps: %s", content("/proc/self/maps"));
	CHECK(reads(shown[1], 0, "old") && !strcmp(content("/tmp/names/again"), "new"), "a file has the content of another");
	expect_shown_descriptor(shown[2], "/tmp/names/#tag (deleted) (deleted)");
	expect_shown_descriptor(shown[3], "/tmp/names/fifo (deleted)");
	expect_shown_descriptor(shown[4], "/tmp/names/inner (deleted)");
	expect_shown("/proc/self/cwd", "/tmp/names/inner (deleted)");
	expect_shown_descriptor(shown[5], "/dev/shm/gone (deleted)");
	char link[64];
	snprintf(link, sizeof link, "/proc/self/fd/%d", shown[0]);
	CHECK(linkat(AT_FDCWD, link, AT_FDCWD, "/tmp/names/mapped", AT_SYMLINK_FOLLOW) == -1 && errno == ENOENT, "it could be linked");
	struct stat now;
	MUST(stat("/tmp/names", &now));
	CHECK(now.st_mtim.tv_sec == 1100000000 && now.st_mtim.tv_nsec == 7, "the directory has changed");
	MUST(chdir("/"));
	MUST(unlink("/tmp/names/again"));
	CHECK(rmdir("/tmp/names") == 0, "something is left in the directory");
}
static void deleted_names_spoil(void) { MUST(dup2(shown[5], shown[0])); }
STATE(deleted_names)

/* Files that the process could not open itself. */

static void forbidden_setup(void)
{
	write_file("/tmp/forbidden", "secret");
	fd = MUST(open("/tmp/forbidden", O_RDWR));
	MUST(chmod("/tmp/forbidden", 0));
	MUST(mkdir("/tmp/closed", 0700));
	other = MUST(open("/tmp/closed/inside", O_RDWR | O_CREAT, 0400));
	MUST(write(other, "inside", 6));
	MUST(chmod("/tmp/closed", 0));
	MUST(setresgid(1000, 1000, 1000));
	MUST(setresuid(1000, 1000, 1000));
}
static void forbidden_check(void)
{
	CHECK(reads(fd, 0, "secret") && reads(other, 0, "inside"), "the content is another");
	CHECK(pwrite(other, "x", 1, 0) == 1, "it can't be written to");
	CHECK(open("/tmp/forbidden", O_RDONLY) == -1 && errno == EACCES, "it can be opened");
}
static void forbidden_spoil(void) { MUST(ftruncate(fd, 0)); }
STATE(forbidden)

/* Numbers. */

static const int high_numbers[] = {10, 63, 64, 255, 256, 257, 1000, 1023};
static void high_numbers_setup(void)
{
	fd = MUST(open("/tmp/high", O_RDWR | O_CREAT, 0600));
	for (size_t i = 0; i < sizeof high_numbers / sizeof *high_numbers; i++) {
		CHECK(fcntl(fd, i % 2 ? F_DUPFD_CLOEXEC : F_DUPFD, high_numbers[i]) == high_numbers[i], "fcntl");
		if (i == 3)
			close(63);
	}
}
static void high_numbers_check(void)
{
	MUST(lseek(fd, 77, SEEK_SET));
	for (size_t i = 0; i < sizeof high_numbers / sizeof *high_numbers; i++) {
		if (high_numbers[i] == 63)
			continue;
		CHECK(lseek(high_numbers[i], 0, SEEK_CUR) == 77, "descriptor %d is another file's", high_numbers[i]);
		CHECK(MUST(fcntl(high_numbers[i], F_GETFD)) == (int)(i % 2), "descriptor %d: close-on-exec", high_numbers[i]);
	}
	CHECK(fcntl(63, F_GETFD) == -1 && errno == EBADF, "descriptor 63 is open");
	CHECK(dup(fd) == fd + 1, "the lowest free number is another");
}
static void high_numbers_spoil(void) { MUST(fcntl(1000, F_SETFD, FD_CLOEXEC)); }
STATE(high_numbers)

static void lowered_limit_setup(void)
{
	fd = MUST(open("/tmp/lowered", O_RDWR | O_CREAT, 0600));
	MUST(dup2(fd, 900));
	struct rlimit limit = {.rlim_cur = 20, .rlim_max = 1024};
	MUST(setrlimit(RLIMIT_NOFILE, &limit));
}
static void lowered_limit_check(void)
{
	MUST(lseek(900, 3, SEEK_SET));
	CHECK(lseek(fd, 0, SEEK_CUR) == 3, "descriptor 900 is another file's");
	CHECK(fcntl(fd, F_DUPFD, 30) == -1, "the limit is gone");
}
static void lowered_limit_spoil(void) { MUST(dup2(MUST(open("/tmp/lowered", O_RDWR)), fd)); }
STATE(lowered_limit)

#define MANY 900
static int many[MANY];
static void many_descriptors_setup(void)
{
	write_file("/tmp/many", "0123456789");
	for (int i = 0; i < MANY; i++) {
		many[i] = i % 3 == 2 ? MUST(dup(many[i - 1])) : MUST(open("/tmp/many", i % 2 ? O_RDONLY : O_RDWR | O_CLOEXEC));
		MUST(lseek(many[i], i, SEEK_SET));
	}
}
static void many_descriptors_check(void)
{
	for (int i = 0; i < MANY; i++)
		CHECK(lseek(many[i], 0, SEEK_CUR) == (i % 3 == 1 ? i + 1 : i), "descriptor %d is at %ld", many[i], (long)lseek(many[i], 0, SEEK_CUR));
}
static void many_descriptors_spoil(void) { MUST(lseek(many[500], 1, SEEK_SET)); }
STATE(many_descriptors)

/* Streams. */

static void stdout_copies_setup(void)
{
	fd = MUST(dup(1));
	other = MUST(open("/proc/self/fd/1", O_WRONLY | O_APPEND));
	MUST(fcntl(other, F_SETFL, O_NONBLOCK | O_APPEND));
	close(0);
}
static void stdout_copies_check(void)
{
	CHECK((flags_of(other) & (O_ACCMODE | O_NONBLOCK)) == (O_WRONLY | O_NONBLOCK), "the second opening has flags %#o", flags_of(other));
	CHECK(!(flags_of(1) & O_NONBLOCK) && !(flags_of(fd) & O_NONBLOCK), "standard output does not block");
	MUST(fcntl(fd, F_SETFL, flags_of(fd) | O_NONBLOCK));
	CHECK(flags_of(1) & O_NONBLOCK, "the copy is another description");
	MUST(fcntl(fd, F_SETFL, flags_of(fd) & ~O_NONBLOCK));
	CHECK(fcntl(0, F_GETFD) == -1, "standard input is open");
}
static void stdout_copies_spoil(void) { MUST(fcntl(other, F_SETFL, O_APPEND)); }
STATE(stdout_copies)

static void stdout_moved_setup(void)
{
	fd = MUST(fcntl(1, F_DUPFD, 50));
	MUST(write(1, "ready\n", 6));
	close(1);
	MUST(open("/tmp/redirected", O_RDWR | O_CREAT | O_APPEND, 0600));
	close(2);
}
static void stdout_moved_check(void)
{
	struct stat a, b;
	MUST(fstat(1, &a));
	MUST(stat("/tmp/redirected", &b));
	CHECK(a.st_ino == b.st_ino, "standard output is not the file");
	CHECK((flags_of(50) & O_ACCMODE) != O_RDONLY, "the stream can't be written to");
	MUST(dup2(50, 1));
}
static void stdout_moved_spoil(void) { dprintf(50, "differs: spoiled\n"), _exit(1); }
STATE(stdout_moved)

static void null_opened_setup(void)
{
	fd = MUST(open("/dev/null", O_WRONLY));
	other = MUST(open("/dev/null", O_RDWR | O_NONBLOCK));
}
static void null_opened_check(void)
{
	CHECK(write(fd, "x", 1) == 1 && write(other, "x", 1) == 1, "null can't be written to");
	CHECK((flags_of(other) & (O_ACCMODE | O_NONBLOCK)) == (O_RDWR | O_NONBLOCK), "flags %#o", flags_of(other));
	CHECK((flags_of(fd) & O_ACCMODE) == O_WRONLY, "flags %#o", flags_of(fd));
}
static void null_opened_spoil(void) { MUST(dup2(0, fd)); }
STATE(null_opened)
