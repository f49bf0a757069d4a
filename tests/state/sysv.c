/* System V shared memory, semaphores and message queues. */
#include "state.h"

#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define PAGE 4096
#define KEY 0x5a17

union semun { int val; struct semid_ds *buf; unsigned short *array; };

static struct shmid_ds shm_status(int id)
{
	struct shmid_ds status;
	MUST(shmctl(id, IPC_STAT, &status));
	return status;
}

static struct semid_ds sem_status(int id)
{
	struct semid_ds status;
	MUST(semctl(id, 0, IPC_STAT, (union semun){.buf = &status}));
	return status;
}

static struct msqid_ds msg_status(int id)
{
	struct msqid_ds status;
	MUST(msgctl(id, IPC_STAT, &status));
	return status;
}

static int value(int id, int number) { return MUST(semctl(id, number, GETVAL)); }

static void op(int id, unsigned short number, int change, int flags)
{
	struct sembuf step = {number, (short)change, (short)flags};
	MUST(semop(id, &step, 1));
}

static void put(int id, long type, const char *text)
{
	struct { long type; char text[256]; } message = {.type = type};
	strcpy(message.text, text);
	MUST(msgsnd(id, &message, strlen(text) + 1, 0));
}

static void expect_message(int id, long wanted, long type, const char *text)
{
	struct { long type; char text[256]; } message;
	CHECK(msgrcv(id, &message, sizeof message.text, wanted, IPC_NOWAIT) >= 0, "a message is missing");
	CHECK(message.type == type && !strcmp(message.text, text), "message %ld %s", message.type, message.text);
}

/* Pipes on which a child waits until its parent says so. */
static int go[2];

static void make_go(void) { MUST(pipe(go)); }

static void wait_go(void)
{
	char byte;
	if (read(go[0], &byte, 1) != 1)
		_exit(9);
}

static void say_go(void) { MUST(write(go[1], "g", 1)); }

/* --- shared memory --- */

static int attached_id, attached_other;
static char *attached_at;

static void sysv_shm_attached_setup(void)
{
	/* The first ids would come by themselves. */
	MUST(shmctl(MUST(shmget(IPC_PRIVATE, PAGE, 0600)), IPC_RMID, NULL));
	attached_other = MUST(shmget(IPC_PRIVATE, PAGE, 0600));
	MUST(shmctl(MUST(shmget(IPC_PRIVATE, PAGE, 0600)), IPC_RMID, NULL));
	attached_id = MUST(shmget(KEY, 5 * PAGE + 77, IPC_CREAT | IPC_EXCL | 0640));
	attached_at = MUST(shmat(attached_id, NULL, 0));
	memset(attached_at + PAGE, 'q', 100);
	attached_at[5 * PAGE + 76] = 'e';
}

static void sysv_shm_attached_check(void)
{
	CHECK(shmget(KEY, 0, 0) == attached_id, "the key leads to another id");
	struct shmid_ds status = shm_status(attached_id);
	CHECK(status.shm_segsz == 5 * PAGE + 77, "size %zu", status.shm_segsz);
	CHECK(status.shm_nattch == 1, "attached %lu times", (unsigned long)status.shm_nattch);
	CHECK(status.shm_perm.mode == 0640, "mode %o", status.shm_perm.mode);
	CHECK(status.shm_perm.__key == KEY, "key %x", status.shm_perm.__key);
	CHECK(status.shm_cpid == getpid() && status.shm_lpid == getpid(), "made by %d, last %d", status.shm_cpid, status.shm_lpid);
	CHECK(attached_at[PAGE] == 'q' && attached_at[PAGE + 99] == 'q' && attached_at[PAGE + 100] == 0, "another content");
	CHECK(attached_at[5 * PAGE + 76] == 'e' && attached_at[0] == 0, "another content at the ends");
	char *again = MUST(shmat(attached_id, NULL, 0));
	again[3] = 'x';
	CHECK(attached_at[3] == 'x', "two attachments of one id have different memory");
	CHECK(shmctl(attached_other, IPC_RMID, NULL) == 0, "the second segment is gone");
	MUST(shmdt(attached_at));
	MUST(shmdt(again));
	CHECK(shm_status(attached_id).shm_nattch == 0, "still attached");
}

static void sysv_shm_attached_spoil(void) { attached_at[PAGE + 5] = 'r'; attached_at[PAGE + 100] = 1; }

STATE(sysv_shm_attached)

static int removed_id;
static char *removed_at;
static pid_t removed_child;

static int removed_body(void)
{
	wait_go();
	return removed_at[0] == 'p' && removed_at[1] == 'n' && shm_status(removed_id).shm_nattch == 2 ? 0 : 1;
}

static void sysv_shm_removed_setup(void)
{
	make_go();
	removed_id = MUST(shmget(KEY, 2 * PAGE, IPC_CREAT | 0600));
	removed_at = MUST(shmat(removed_id, NULL, 0));
	removed_at[0] = 'p';
	removed_child = in_child(removed_body);
	MUST(shmctl(removed_id, IPC_RMID, NULL));
}

static void sysv_shm_removed_check(void)
{
	CHECK(shmget(KEY, 0, 0) == -1 && errno == ENOENT, "a removed segment can be found by its key");
	struct shmid_ds status = shm_status(removed_id);
	CHECK(status.shm_perm.mode & SHM_DEST, "it is not marked for removal");
	CHECK(status.shm_perm.__key == IPC_PRIVATE, "it has a key");
	CHECK(removed_at[0] == 'p', "another content");
	removed_at[1] = 'n';
	say_go();
	expect_exit(removed_child, 0);
	MUST(shmdt(removed_at));
	CHECK(shmctl(removed_id, IPC_STAT, &status) == -1 && errno == EINVAL, "it lives without anybody who has it");
}

static void sysv_shm_removed_spoil(void) { removed_at[0] = 0; }

STATE(sysv_shm_removed)

static int idle_id;

static void sysv_shm_unattached_setup(void)
{
	idle_id = MUST(shmget(KEY + 1, 3 * PAGE, IPC_CREAT | 0600));
	char *at = MUST(shmat(idle_id, NULL, 0));
	strcpy(at + 2 * PAGE, "left behind");
	MUST(shmdt(at));
}

static void sysv_shm_unattached_check(void)
{
	struct shmid_ds status = shm_status(idle_id);
	CHECK(status.shm_nattch == 0, "somebody has it");
	CHECK(status.shm_lpid == getpid(), "the last was %d", status.shm_lpid);
	char *at = MUST(shmat(MUST(shmget(KEY + 1, 0, 0)), NULL, SHM_RDONLY));
	CHECK(!strcmp(at + 2 * PAGE, "left behind"), "another content");
}

static void sysv_shm_unattached_spoil(void)
{
	char *at = MUST(shmat(idle_id, NULL, 0));
	at[2 * PAGE] = 'L';
	MUST(shmdt(at));
}

STATE(sysv_shm_unattached)

static int shapes_id;
static char *shapes[4];

/* What the program has grown reaches behind the end of the segment. */
static int grown_id;
static char *grown, *behind;

static void sysv_shm_grown_setup(void)
{
	grown_id = MUST(shmget(IPC_PRIVATE, 2 * PAGE, 0600));
	char *at = MUST(shmat(grown_id, NULL, 0));
	grown = MUST(mremap(at, 2 * PAGE, 6 * PAGE, MREMAP_MAYMOVE));
	grown[PAGE] = 'g';
	/* A part that lies there altogether. */
	behind = MUST(mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	MUST(mremap(grown + 4 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, behind));
}
static void sysv_shm_grown_check(void)
{
	CHECK(grown[PAGE] == 'g', "its content is gone");
	CHECK(msync(grown, 4 * PAGE, MS_ASYNC) == 0 && msync(grown + 5 * PAGE, PAGE, MS_ASYNC) == 0, "it is not mapped behind the end");
	CHECK(msync(grown + 4 * PAGE, PAGE, MS_ASYNC) == -1 && errno == ENOMEM, "the hole is gone");
	CHECK(msync(behind, PAGE, MS_ASYNC) == 0, "what was moved is gone");
	int ends[2];
	MUST(pipe(ends));
	CHECK(write(ends[1], behind, 1) == -1 && errno == EFAULT, "there is something behind the end");
	struct shmid_ds status = shm_status(grown_id);
	CHECK(status.shm_nattch == 3, "attached %lu times", (unsigned long)status.shm_nattch);
}
static void sysv_shm_grown_spoil(void) { grown[PAGE] = 'h'; }
STATE(sysv_shm_grown)

static void sysv_shm_shapes_setup(void)
{
	shapes_id = MUST(shmget(IPC_PRIVATE, 8 * PAGE, 0600));
	shapes[0] = MUST(shmat(shapes_id, NULL, 0));
	for (int page = 0; page < 8; page++)
		shapes[0][page * PAGE] = (char)('a' + page);
	shapes[1] = MUST(shmat(shapes_id, NULL, SHM_RDONLY));
	/* A hole, a part of another protection, and a part that was moved away. */
	MUST(munmap(shapes[0] + 2 * PAGE, PAGE));
	MUST(mprotect(shapes[0] + 4 * PAGE, PAGE, PROT_NONE));
	shapes[2] = MUST(mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	MUST((long)mremap(shapes[0] + 6 * PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, shapes[2]));
	/* At a place where the program wants it. */
	shapes[3] = MUST(shmat(shapes_id, (void *)0x300000000, 0));
}

static void sysv_shm_shapes_check(void)
{
	CHECK(shapes[3] == (void *)0x300000000 && shapes[3][5 * PAGE] == 'f', "not at its address");
	CHECK(shapes[1][7 * PAGE] == 'h' && shapes[2][PAGE] == 'h' && shapes[2][0] == 'g', "other parts");
	CHECK(shapes[0][0] == 'a' && shapes[0][3 * PAGE] == 'd', "other parts");
	CHECK(msync(shapes[0] + 2 * PAGE, PAGE, MS_ASYNC) == -1 && errno == ENOMEM, "the hole is gone");
	shapes[3][7 * PAGE] = 'H';
	CHECK(shapes[2][PAGE] == 'H' && shapes[1][7 * PAGE] == 'H', "the parts have different memory");
	int pipes[2];
	MUST(pipe(pipes));
	CHECK(write(pipes[1], shapes[0] + 4 * PAGE, 1) == -1 && errno == EFAULT, "a part can be read");
	MUST(write(pipes[1], "x", 1));
	CHECK(read(pipes[0], shapes[1], 1) == -1 && errno == EFAULT, "a read-only attachment can be written");
	CHECK(mprotect(shapes[1], PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "a read-only attachment can become writable");
	/* first part, after the hole, protected, after it, moved, and two whole ones */
	struct shmid_ds status = shm_status(shapes_id);
	CHECK(status.shm_nattch == 7, "attached %lu times", (unsigned long)status.shm_nattch);
}

static void sysv_shm_shapes_spoil(void) { MUST(mprotect(shapes[0] + 4 * PAGE, PAGE, PROT_READ)); }

STATE(sysv_shm_shapes)

static int owned_id;

static void sysv_shm_owner_setup(void)
{
	owned_id = MUST(shmget(KEY, PAGE, IPC_CREAT | 0600));
	struct shmid_ds status = shm_status(owned_id);
	status.shm_perm.uid = 1000;
	status.shm_perm.gid = 100;
	status.shm_perm.mode = 0462;
	MUST(shmctl(owned_id, IPC_SET, &status));
}

static void sysv_shm_owner_check(void)
{
	struct shmid_ds status = shm_status(owned_id);
	CHECK(status.shm_perm.uid == 1000 && status.shm_perm.gid == 100, "another owner");
	CHECK(status.shm_perm.cuid == 0 && status.shm_perm.cgid == 0, "another creator");
	CHECK((status.shm_perm.mode & 0777) == 0462, "mode %o", status.shm_perm.mode);
}

static void sysv_shm_owner_spoil(void)
{
	struct shmid_ds status = shm_status(owned_id);
	status.shm_perm.gid = 7;
	MUST(shmctl(owned_id, IPC_SET, &status));
}

STATE(sysv_shm_owner)

static int creator_ids[3];
static pid_t creator_child;

static int creator_body(void)
{
	wait_go();
	return 0;
}

static int creator_make(void)
{
	MUST(setresgid(100, 100, 100));
	MUST(setresuid(1000, 1000, 1000));
	MUST(shmget(KEY + 3, PAGE, IPC_CREAT | 0644));
	MUST(semget(KEY + 3, 1, IPC_CREAT | 0644));
	MUST(msgget(KEY + 3, IPC_CREAT | 0644));
	return creator_body();
}

static void sysv_creator_setup(void)
{
	make_go();
	creator_child = in_child(creator_make);
	while ((creator_ids[2] = msgget(KEY + 3, 0)) == -1)
		usleep(1000);
	creator_ids[0] = MUST(shmget(KEY + 3, 0, 0));
	creator_ids[1] = MUST(semget(KEY + 3, 0, 0));
}

static void sysv_creator_check(void)
{
	struct shmid_ds status = shm_status(creator_ids[0]);
	CHECK(status.shm_cpid == creator_child, "made by %d", status.shm_cpid);
	struct ipc_perm perms[3] = {status.shm_perm, sem_status(creator_ids[1]).sem_perm, msg_status(creator_ids[2]).msg_perm};
	for (int kind = 0; kind < 3; kind++)
		CHECK(perms[kind].cuid == 1000 && perms[kind].cgid == 100 && perms[kind].uid == 1000 && perms[kind].gid == 100,
			"kind %d has another creator", kind);
	say_go();
	expect_exit(creator_child, 0);
}

static void sysv_creator_spoil(void) { MUST(shmctl(creator_ids[0], IPC_RMID, NULL)); }

STATE(sysv_creator)

static int locked_id;

static void sysv_shm_locked_setup(void)
{
	locked_id = MUST(shmget(IPC_PRIVATE, 4 * PAGE, 0600));
	char *at = MUST(shmat(locked_id, NULL, 0));
	at[PAGE] = 'l';
	MUST(shmctl(locked_id, SHM_LOCK, NULL));
}

static void sysv_shm_locked_check(void) { CHECK(shm_status(locked_id).shm_perm.mode & SHM_LOCKED, "it is not locked"); }

static void sysv_shm_locked_spoil(void) { MUST(shmctl(locked_id, SHM_UNLOCK, NULL)); }

STATE(sysv_shm_locked)

static int many_ids[40];

static void sysv_shm_many_setup(void)
{
	for (int index = 0; index < 40; index++) {
		many_ids[index] = MUST(shmget(KEY + index, (size_t)(index + 1) * 1000, IPC_CREAT | 0600));
		char *at = MUST(shmat(many_ids[index], NULL, 0));
		memset(at, index + 1, (size_t)(index + 1) * 1000);
		if (index % 3 == 0)
			MUST(shmdt(at));
	}
	for (int index = 1; index < 40; index += 5)
		MUST(shmctl(many_ids[index], IPC_RMID, NULL));
}

static void sysv_shm_many_check(void)
{
	for (int index = 0; index < 40; index++) {
		bool removed = index % 5 == 1;
		if (!removed)
			CHECK(shmget(KEY + index, 0, 0) == many_ids[index], "segment %d has another id", index);
		if (removed && index % 3 == 0)
			continue;
		char *at = MUST(shmat(many_ids[index], NULL, 0));
		for (int byte = 0; byte < (index + 1) * 1000; byte++)
			CHECK(at[byte] == index + 1, "segment %d has %d at %d", index, at[byte], byte);
	}
}

static void sysv_shm_many_spoil(void)
{
	char *at = MUST(shmat(many_ids[30], NULL, 0));
	at[30000] = 1;
}

STATE(sysv_shm_many)

/* --- semaphores --- */

static int values_id;

static void sysv_sem_values_setup(void)
{
	MUST(semctl(MUST(semget(IPC_PRIVATE, 1, 0600)), 0, IPC_RMID));
	values_id = MUST(semget(KEY, 5, IPC_CREAT | 0604));
	unsigned short array[5] = {0, 1, 32767, 12, 0};
	MUST(semctl(values_id, 0, SETALL, (union semun){.array = array}));
	op(values_id, 3, -2, 0);
}

static void sysv_sem_values_check(void)
{
	CHECK(semget(KEY, 0, 0) == values_id, "the key leads to another id");
	struct semid_ds status = sem_status(values_id);
	CHECK(status.sem_nsems == 5 && status.sem_perm.mode == 0604, "%lu semaphores, mode %o", status.sem_nsems, status.sem_perm.mode);
	unsigned short array[5];
	MUST(semctl(values_id, 0, GETALL, (union semun){.array = array}));
	CHECK(array[0] == 0 && array[1] == 1 && array[2] == 32767 && array[3] == 10 && array[4] == 0, "other values");
	CHECK(status.sem_otime != 0, "nobody has operated on it");
	CHECK(MUST(semctl(values_id, 3, GETPID)) == getpid(), "another process was last");
}

static void sysv_sem_values_spoil(void) { op(values_id, 0, 1, 0); }

STATE(sysv_sem_values)

static int untouched_id;

/* As many as a set can have, some of them changed by another process. */
#define MANY 32000
static int many_id;
static pid_t many_child;

static int change_many(void)
{
	for (unsigned short number = 0; number < MANY; number += 400)
		op(many_id, number, 2, 0);
	until_finishing();
	return 0;
}
static void sysv_sem_many_setup(void)
{
	static unsigned short values[MANY];
	for (int i = 0; i < MANY; i++)
		values[i] = (unsigned short)(i % 30000);
	many_id = MUST(semget(IPC_PRIVATE, MANY, 0600));
	MUST(semctl(many_id, 0, SETALL, values));
	many_child = in_child(change_many);
	while (semctl(many_id, MANY - 400, GETPID) != many_child)
		usleep(1000);
}
static void sysv_sem_many_check(void)
{
	static unsigned short values[MANY];
	MUST(semctl(many_id, 0, GETALL, values));
	for (int i = 0; i < MANY; i++)
		CHECK(values[i] == i % 30000 + (i % 400 ? 0 : 2), "semaphore %d is %u", i, values[i]);
	for (int i = 0; i < MANY; i += 100)
		CHECK(semctl(many_id, i, GETPID) == (i % 400 ? getpid() : many_child), "semaphore %d was changed by another process", i);
	struct semid_ds status;
	MUST(semctl(many_id, 0, IPC_STAT, &status));
	CHECK(status.sem_otime, "nobody has changed it");
	expect_exit(many_child, 0);
}
static void sysv_sem_many_spoil(void) { op(many_id, 7, 1, 0); }
STATE(sysv_sem_many)

/* Programs take a set whose otime is 0 for one that nobody has initialized. */
static void sysv_sem_untouched_setup(void)
{
	untouched_id = MUST(semget(KEY, 2, IPC_CREAT | 0600));
	MUST(semctl(untouched_id, 1, SETVAL, (union semun){.val = 4}));
}

static void sysv_sem_untouched_check(void)
{
	CHECK(sem_status(untouched_id).sem_otime == 0, "somebody has operated on it");
	CHECK(value(untouched_id, 0) == 0 && value(untouched_id, 1) == 4, "other values");
	CHECK(MUST(semctl(untouched_id, 0, GETPID)) == 0, "somebody has changed the first");
	CHECK(MUST(semctl(untouched_id, 1, GETPID)) == getpid(), "somebody else has changed the second");
}

static void sysv_sem_untouched_spoil(void) { op(untouched_id, 0, 0, 0); }

STATE(sysv_sem_untouched)

static int pids_id;
static pid_t pids_children[3];

static int pids_body(void)
{
	/* The number of its own semaphore: how many were made before it. */
	unsigned short number = 0;
	while (number < 3 && pids_children[number])
		number++;
	op(pids_id, number, 1, 0);
	wait_go();
	return MUST(semctl(pids_id, number, GETPID)) == getpid() ? 0 : 1;
}

static void sysv_sem_pids_setup(void)
{
	make_go();
	pids_id = MUST(semget(IPC_PRIVATE, 3, 0600));
	for (int index = 0; index < 3; index++) {
		pids_children[index] = in_child(pids_body);
		while (value(pids_id, index) == 0)
			usleep(1000);
	}
}

static void sysv_sem_pids_check(void)
{
	for (int index = 0; index < 3; index++)
		CHECK(semctl(pids_id, index, GETPID) == pids_children[index], "another process changed %d", index);
	for (int index = 0; index < 3; index++)
		say_go();
	for (int index = 0; index < 3; index++)
		expect_exit(pids_children[index], 0);
}

static void sysv_sem_pids_spoil(void) { op(pids_id, 1, 1, 0); }

STATE(sysv_sem_pids)

static int undo_id;
static pid_t undo_child;

static int undo_body(void)
{
	/* Adjustments of +2, -3, +32000, none. */
	op(undo_id, 0, -2, SEM_UNDO);
	op(undo_id, 1, 3, SEM_UNDO);
	op(undo_id, 2, -32000, SEM_UNDO);
	op(undo_id, 3, 1, 0);
	wait_go();
	return 0;
}

static void sysv_sem_undo_setup(void)
{
	make_go();
	undo_id = MUST(semget(IPC_PRIVATE, 5, 0600));
	unsigned short array[5] = {7, 0, 32001, 0, 1};
	MUST(semctl(undo_id, 0, SETALL, (union semun){.array = array}));
	op(undo_id, 4, -1, SEM_UNDO);
	undo_child = in_child(undo_body);
	while (value(undo_id, 3) == 0)
		usleep(1000);
}

static void sysv_sem_undo_check(void)
{
	CHECK(value(undo_id, 0) == 5 && value(undo_id, 1) == 3 && value(undo_id, 2) == 1 && value(undo_id, 4) == 0, "other values");
	say_go();
	expect_exit(undo_child, 0);
	int got[5];
	for (int index = 0; index < 5; index++)
		got[index] = value(undo_id, index);
	CHECK(got[0] == 7 && got[1] == 0 && got[2] == 32001 && got[3] == 1, "after its end: %d %d %d %d", got[0], got[1], got[2], got[3]);
	/* What this process owes, it still owes: up to its end nobody can take the last one. */
	CHECK(got[4] == 0, "the own one came back");
}

/* SETVAL forgets what is owed. */
static void sysv_sem_undo_spoil(void) { MUST(semctl(undo_id, 1, SETVAL, (union semun){.val = 3})); }

STATE(sysv_sem_undo)

static int killed_id;
static pid_t killed_child;

static int killed_body(void)
{
	op(killed_id, 0, -1, SEM_UNDO);
	return pause();
}

static void sysv_sem_undo_killed_setup(void)
{
	killed_id = MUST(semget(IPC_PRIVATE, 1, 0600));
	op(killed_id, 0, 1, 0);
	killed_child = in_child(killed_body);
	while (value(killed_id, 0))
		usleep(1000);
}

static void sysv_sem_undo_killed_check(void)
{
	MUST(kill(killed_child, SIGKILL));
	MUST(waitpid(killed_child, NULL, 0));
	CHECK(value(killed_id, 0) == 1, "the lock of a killed process stays");
}

static void sysv_sem_undo_killed_spoil(void) { MUST(semctl(killed_id, 0, SETVAL, (union semun){.val = 0})); }

STATE(sysv_sem_undo_killed)

static int waiting_id;
static pid_t waiting_children[2];

static int waiting_body(void)
{
	struct sembuf step = {0, -2, 0};
	return semop(waiting_id, &step, 1) == 0 ? 0 : 1;
}

static int waiting_zero_body(void)
{
	struct sembuf step = {1, 0, 0};
	struct timespec limit = {.tv_sec = 300};
	return semtimedop(waiting_id, &step, 1, &limit) == 0 ? 0 : 1;
}

static void sysv_sem_waiting_setup(void)
{
	waiting_id = MUST(semget(IPC_PRIVATE, 2, 0600));
	op(waiting_id, 1, 1, 0);
	waiting_children[0] = in_child(waiting_body);
	waiting_children[1] = in_child(waiting_zero_body);
	while (MUST(semctl(waiting_id, 0, GETNCNT)) != 1 || MUST(semctl(waiting_id, 1, GETZCNT)) != 1)
		usleep(1000);
}

static void sysv_sem_waiting_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a waiting process has ended");
	op(waiting_id, 0, 2, 0);
	op(waiting_id, 1, -1, 0);
	expect_exit(waiting_children[0], 0);
	expect_exit(waiting_children[1], 0);
	CHECK(value(waiting_id, 0) == 0, "it took another amount");
}

static void sysv_sem_waiting_spoil(void) { MUST(kill(waiting_children[0], SIGKILL)); }

STATE(sysv_sem_waiting)

static int large_id;

static void sysv_sem_large_setup(void)
{
	large_id = MUST(semget(IPC_PRIVATE, 3000, 0600));
	static unsigned short array[3000];
	for (int index = 0; index < 3000; index++)
		array[index] = (unsigned short)(index * 7 % 1000);
	MUST(semctl(large_id, 0, SETALL, (union semun){.array = array}));
	op(large_id, 2999, 1, SEM_UNDO);
}

static void sysv_sem_large_check(void)
{
	static unsigned short array[3000];
	MUST(semctl(large_id, 0, GETALL, (union semun){.array = array}));
	for (int index = 0; index < 2999; index++)
		CHECK(array[index] == index * 7 % 1000, "semaphore %d has %d", index, array[index]);
	CHECK(array[2999] == 2999 * 7 % 1000 + 1, "the last has %d", array[2999]);
}

static void sysv_sem_large_spoil(void) { op(large_id, 1500, 1, 0); }

STATE(sysv_sem_large)

/* --- message queues --- */

static int queue_id;

static void sysv_msg_queue_setup(void)
{
	MUST(msgctl(MUST(msgget(IPC_PRIVATE, 0600)), IPC_RMID, NULL));
	queue_id = MUST(msgget(KEY, IPC_CREAT | 0620));
	put(queue_id, 9, "gone");
	expect_message(queue_id, 0, 9, "gone");
	put(queue_id, 3, "first");
	put(queue_id, 1, "second");
	put(queue_id, 3, "");
	put(queue_id, 0x7fffffffffffLL, "fourth");
}

static void sysv_msg_queue_check(void)
{
	CHECK(msgget(KEY, 0) == queue_id, "the key leads to another id");
	struct msqid_ds status = msg_status(queue_id);
	CHECK(status.msg_qnum == 4, "%lu messages", status.msg_qnum);
	CHECK(status.msg_perm.mode == 0620, "mode %o", status.msg_perm.mode);
	CHECK(status.msg_lspid == getpid() && status.msg_lrpid == getpid(), "last: %d and %d", status.msg_lspid, status.msg_lrpid);
	expect_message(queue_id, -2, 1, "second");
	expect_message(queue_id, 0, 3, "first");
	expect_message(queue_id, 0, 3, "");
	expect_message(queue_id, 0, 0x7fffffffffffLL, "fourth");
}

static void sysv_msg_queue_spoil(void) { expect_message(queue_id, 0, 3, "first"); }

STATE(sysv_msg_queue)

static int limit_id;

static void sysv_msg_limit_setup(void)
{
	limit_id = MUST(msgget(IPC_PRIVATE, 0600));
	struct msqid_ds status = msg_status(limit_id);
	put(limit_id, 1, "0123456789");
	/* Below what it holds. */
	status.msg_qbytes = 8;
	MUST(msgctl(limit_id, IPC_SET, &status));
}

static void sysv_msg_limit_check(void)
{
	struct msqid_ds status = msg_status(limit_id);
	CHECK(status.msg_qbytes == 8 && status.msg_qnum == 1, "%lu bytes, %lu messages", status.msg_qbytes, status.msg_qnum);
	struct { long type; char text[4]; } message = {.type = 1};
	CHECK(msgsnd(limit_id, &message, 4, IPC_NOWAIT) == -1 && errno == EAGAIN, "there is room in it");
	expect_message(limit_id, 0, 1, "0123456789");
	CHECK(msgsnd(limit_id, &message, 4, IPC_NOWAIT) == 0, "there is no room in it");
}

static void sysv_msg_limit_spoil(void)
{
	struct msqid_ds status = msg_status(limit_id);
	status.msg_qbytes = 100;
	MUST(msgctl(limit_id, IPC_SET, &status));
}

STATE(sysv_msg_limit)

static int full_id;
static unsigned long full_count;

static void sysv_msg_full_setup(void)
{
	full_id = MUST(msgget(IPC_PRIVATE, 0600));
	struct { long type; char text[1]; } message = {.type = 1};
	for (full_count = 0; full_count < 3000; full_count++) {
		message.type = (long)(full_count % 97 + 1);
		message.text[0] = (char)full_count;
		MUST(msgsnd(full_id, &message, full_count % 2, IPC_NOWAIT));
	}
	struct { long type; char text[8192]; } large = {.type = 100};
	memset(large.text, 'L', sizeof large.text);
	MUST(msgsnd(full_id, &large, sizeof large.text, IPC_NOWAIT));
}

static void sysv_msg_full_check(void)
{
	struct { long type; char text[8192]; } message;
	for (unsigned long index = 0; index < full_count; index++) {
		ssize_t bytes = msgrcv(full_id, &message, sizeof message.text, 0, IPC_NOWAIT);
		CHECK(bytes == (ssize_t)(index % 2) && message.type == (long)(index % 97 + 1), "message %lu", index);
		CHECK(bytes == 0 || message.text[0] == (char)index, "content %lu", index);
	}
	CHECK(msgrcv(full_id, &message, sizeof message.text, 0, IPC_NOWAIT) == 8192 && message.text[8191] == 'L', "the large one");
}

static void sysv_msg_full_spoil(void)
{
	struct { long type; char text[1]; } message;
	MUST(msgrcv(full_id, &message, 1, 50, 0));
}

STATE(sysv_msg_full)

static int blocked_id[2];
static pid_t blocked_children[2];

static int receiver_body(void)
{
	struct { long type; char text[16]; } message;
	return msgrcv(blocked_id[0], &message, sizeof message.text, 5, 0) == 6 && !strcmp(message.text, "hello") ? 0 : 1;
}

static int sender_body(void)
{
	struct { long type; char text[16]; } message = {.type = 7, .text = "world"};
	return msgsnd(blocked_id[1], &message, 6, 0) == 0 ? 0 : 1;
}

static void sysv_msg_blocked_setup(void)
{
	for (int index = 0; index < 2; index++)
		blocked_id[index] = MUST(msgget(IPC_PRIVATE, 0600));
	struct msqid_ds status = msg_status(blocked_id[1]);
	status.msg_qbytes = 8;
	MUST(msgctl(blocked_id[1], IPC_SET, &status));
	put(blocked_id[1], 1, "block");
	put(blocked_id[0], 4, "other");
	blocked_children[0] = in_child(receiver_body);
	blocked_children[1] = in_child(sender_body);
	usleep(50000);
}

static void sysv_msg_blocked_check(void)
{
	CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a blocked process has ended");
	put(blocked_id[0], 5, "hello");
	expect_exit(blocked_children[0], 0);
	expect_message(blocked_id[1], 0, 1, "block");
	expect_exit(blocked_children[1], 0);
	expect_message(blocked_id[1], 0, 7, "world");
}

static void sysv_msg_blocked_spoil(void) { put(blocked_id[0], 5, "hallo"); }

STATE(sysv_msg_blocked)

/* --- limits of the namespace --- */

static const char *limit_of(const char *name)
{
	char path[128];
	sprintf(path, "/tmp/proc/sys/%s", name);
	return content(path);
}

static void set_limit(const char *name, const char *value)
{
	char path[128];
	sprintf(path, "/tmp/proc/sys/%s", name);
	int fd = MUST(open(path, O_WRONLY));
	MUST(write(fd, value, strlen(value)));
	MUST(close(fd));
}

static void with_proc(void (*act)(void))
{
	if (mkdir("/tmp/proc", 0700) == -1)
		CHECK(errno == EEXIST, "failed: mkdir");
	MUST(mount("proc", "/tmp/proc", "proc", 0, NULL));
	act();
	MUST(umount2("/tmp/proc", MNT_DETACH));
}

static void raise_limits(void)
{
	set_limit("kernel/msgmax", "9000");
	set_limit("kernel/sem", "100000000 320000000 50000000 31000");
	set_limit("kernel/shmmni", "77");
	set_limit("fs/mqueue/msg_max", "21");
	set_limit("kernel/sem_next_id", "4711");
	MUST(msgget(IPC_PRIVATE, 0600));
}

static void compare_limits(void)
{
	CHECK(!strcmp(limit_of("kernel/msgmax"), "9000\n"), "msgmax %s", limit_of("kernel/msgmax"));
	CHECK(!strcmp(limit_of("kernel/sem"), "100000000\t320000000\t50000000\t31000\n"), "sem %s", limit_of("kernel/sem"));
	CHECK(!strcmp(limit_of("kernel/shmmni"), "77\n"), "shmmni %s", limit_of("kernel/shmmni"));
	CHECK(!strcmp(limit_of("fs/mqueue/msg_max"), "21\n"), "msg_max %s", limit_of("fs/mqueue/msg_max"));
	CHECK(!strcmp(limit_of("kernel/sem_next_id"), "4711\n"), "the next set is %s", limit_of("kernel/sem_next_id"));
}

static void spoil_limits(void) { set_limit("kernel/shmmni", "78"); }

static void sysv_limits_setup(void) { with_proc(raise_limits); }
static void sysv_limits_check(void) { with_proc(compare_limits); }
static void sysv_limits_spoil(void) { with_proc(spoil_limits); }

STATE(sysv_limits, .privileged = true)
