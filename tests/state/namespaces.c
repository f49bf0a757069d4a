/* Namespaces of processes, and what a program does to those of its container. */
#include "state.h"
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/utsname.h>

static pid_t child;
static volatile int *stage;

static int wanted;

static int in_namespace(void)
{
	if (unshare(wanted)) {
		*stage = -errno;
		return 9;
	}
	*stage = 1;
	until_finishing();
	return 4;
}

static void start(int flags)
{
	stage = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	wanted = flags;
	child = in_child(in_namespace);
	while (!*stage)
		usleep(1000);
	CHECK(*stage == 1, "unshare failed: %d", *stage);
}

#define OWN(name, flag, says) \
	static void name##_setup(void) { start(flag); } \
	static void name##_check(void) { expect_exit(child, 4); } \
	static void name##_spoil(void) { MUST(waitpid(child, NULL, 0)); } \
	STATE(name, .privileged = true, .refused = says)
OWN(own_uts_namespace, CLONE_NEWUTS, "uts namespace of its own")
OWN(own_ipc_namespace, CLONE_NEWIPC, "ipc namespace of its own")
OWN(own_net_namespace, CLONE_NEWNET, "net namespace of its own")
OWN(own_mount_namespace, CLONE_NEWNS, "mnt namespace of its own")
OWN(own_cgroup_namespace, CLONE_NEWCGROUP, "cgroup namespace of its own")
OWN(own_user_namespace, CLONE_NEWUSER, "user namespace of its own")
OWN(own_pid_namespace_of_children, CLONE_NEWPID, "pid namespace for its children")
OWN(own_time_namespace_of_children, 0x80 /* CLONE_NEWTIME */, "time namespace for its children")

static int nested_body(void *unused)
{
	(void)unused;
	until_finishing();
	return 4;
}
static char stack[65536];

static void nested_pid_namespace_setup(void)
{
	child = MUST(clone(nested_body, stack + sizeof stack, CLONE_NEWPID | SIGCHLD, NULL));
}
static void nested_pid_namespace_check(void) { expect_exit(child, 4); }
static void nested_pid_namespace_spoil(void) { MUST(waitpid(child, NULL, 0)); }
STATE(nested_pid_namespace, .privileged = true, .refused = "nested pid namespace")

static void host_name_set_setup(void)
{
	MUST(sethostname("another-name", 12));
	MUST(setdomainname("another.domain", 14));
}
static void host_name_set_check(void)
{
	struct utsname names;
	MUST(uname(&names));
	CHECK(!strcmp(names.nodename, "another-name"), "the host is %s", names.nodename);
	CHECK(!strcmp(names.domainname, "another.domain"), "the domain is %s", names.domainname);
}
static void host_name_set_spoil(void) { MUST(sethostname("box", 3)); }
STATE(host_name_set, .privileged = true)

static void mount_made_setup(void)
{
	MUST(mkdir("/tmp/mounted", 0700));
	MUST(mount("tmpfs", "/tmp/mounted", "tmpfs", 0, NULL));
	close(MUST(open("/tmp/mounted/file", O_CREAT | O_WRONLY, 0600)));
}
static void mount_made_check(void) { CHECK(access("/tmp/mounted/file", F_OK) == 0, "the mount is gone"); }
static void mount_made_spoil(void) { MUST(umount("/tmp/mounted")); }
STATE(mount_made, .privileged = true, .refused = "has mounted tmpfs at /tmp/mounted")

static void mount_below_proc_setup(void) { MUST(mount("/proc/sys/net", "/proc/sys/net", NULL, MS_BIND, NULL)); }
static void mount_below_proc_check(void) { MUST(umount("/proc/sys/net")); }
static void mount_below_proc_spoil(void) { mount_below_proc_check(); }
STATE(mount_below_proc, .privileged = true, .refused = "has mounted proc at /proc/sys/net")

static void mount_over_another_setup(void) { MUST(mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL)); }
static void mount_over_another_check(void) { MUST(umount("/dev/shm")); }
static void mount_over_another_spoil(void)
{
	MUST(umount("/dev/shm"));
	MUST(umount("/dev/shm"));
}
STATE(mount_over_another, .privileged = true, .refused = "has mounted tmpfs at /dev/shm")

static void mount_removed_setup(void) { MUST(umount("/dev/mqueue")); }
static void mount_removed_check(void) { CHECK(umount("/dev/mqueue") == -1, "it is mounted"); }
static void mount_removed_spoil(void) { MUST(mount("mqueue", "/dev/mqueue", "mqueue", 0, NULL)); }
STATE(mount_removed, .privileged = true, .refused = "has unmounted /dev/mqueue")
