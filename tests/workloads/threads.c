/*
 * Threads, each with a register state, thread-local storage, a signal mask and a rounding mode of its own; robust mutexes,
 * one of them held and left by a thread that ends; condition variables with deadlines, and a token handed round by them.
 */
#include "workload.h"
#include <fenv.h>
#include <immintrin.h>
#include <sched.h>

#define THREADS 8

static __thread uint64_t local_value;
static __thread char local_block[8192];
static pthread_barrier_t all_stand;
static pthread_mutex_t held = PTHREAD_MUTEX_INITIALIZER;
static _Atomic bool stop;

/* Registers are loaded, kept over a spin of some milliseconds in which nothing else may touch them, and stored. */
static void general_registers(uint64_t seed)
{
	uint64_t in[12], out[12];
	for (int i = 0; i < 12; i++)
		in[i] = mix(seed + (uint64_t)i);
	__asm__ volatile(
		"push %%rbp\n\t push %%rbx\n\t"
		"mov %[in], %%rax\n\t push %[out]\n\t"
		"mov 0(%%rax), %%rbx\n\t mov 8(%%rax), %%rdx\n\t mov 16(%%rax), %%rsi\n\t mov 24(%%rax), %%rdi\n\t"
		"mov 32(%%rax), %%r8\n\t mov 40(%%rax), %%r9\n\t mov 48(%%rax), %%r10\n\t mov 56(%%rax), %%r11\n\t"
		"mov 64(%%rax), %%r12\n\t mov 72(%%rax), %%r13\n\t mov 80(%%rax), %%r14\n\t mov 88(%%rax), %%rbp\n\t"
		"mov $20000000, %%ecx\n\t"
		"1: dec %%ecx\n\t jnz 1b\n\t"
		"pop %%rax\n\t"
		"mov %%rbx, 0(%%rax)\n\t mov %%rdx, 8(%%rax)\n\t mov %%rsi, 16(%%rax)\n\t mov %%rdi, 24(%%rax)\n\t"
		"mov %%r8, 32(%%rax)\n\t mov %%r9, 40(%%rax)\n\t mov %%r10, 48(%%rax)\n\t mov %%r11, 56(%%rax)\n\t"
		"mov %%r12, 64(%%rax)\n\t mov %%r13, 72(%%rax)\n\t mov %%r14, 80(%%rax)\n\t mov %%rbp, 88(%%rax)\n\t"
		"pop %%rbx\n\t pop %%rbp\n\t"
		:
		: [in] "r"(in), [out] "r"(out)
		: "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "memory", "cc");
	if (breaking("registers"))
		out[3] ^= 1;
	for (int i = 0; i < 12; i++)
		CHECK(in[i] == out[i], "general register %d holds %llx in place of %llx", i, (unsigned long long)out[i], (unsigned long long)in[i]);
}

#define LOAD(n) "vmovdqu %c[w]*" #n "(%[in]), " REG #n "\n\t"
#define STORE(n) "vmovdqu " REG #n ", %c[w]*" #n "(%[out])\n\t"
#define ALL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define CLOBBER "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

#define REG "%%ymm"
__attribute__((target("avx"))) static void hold_avx(const void *in, void *out)
{
	__asm__ volatile(ALL(LOAD) "mov $20000000, %%ecx\n\t 1: dec %%ecx\n\t jnz 1b\n\t" ALL(STORE) "vzeroupper"
		: : [in] "r"(in), [out] "r"(out), [w] "i"(32) : "rcx", "memory", "cc", CLOBBER);
}
#undef REG
#undef LOAD
#undef STORE
#define LOAD(n) "vmovdqu64 %c[w]*" #n "(%[in]), %%zmm" #n "\n\t"
#define STORE(n) "vmovdqu64 %%zmm" #n ", %c[w]*" #n "(%[out])\n\t"
#define HIGH(X) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
__attribute__((target("avx512f,avx512bw"))) static void hold_avx512(const void *in, void *out, uint64_t *masks)
{
	__asm__ volatile(ALL(LOAD) HIGH(LOAD) "kmovq 0(%[masks]), %%k1\n\t kmovq 8(%[masks]), %%k7\n\t"
		"mov $20000000, %%ecx\n\t 1: dec %%ecx\n\t jnz 1b\n\t"
		ALL(STORE) HIGH(STORE) "kmovq %%k1, 16(%[masks])\n\t kmovq %%k7, 24(%[masks])\n\t vzeroupper"
		: : [in] "r"(in), [out] "r"(out), [masks] "r"(masks), [w] "i"(64) : "rcx", "memory", "cc", CLOBBER);
}

static void vector_registers(uint64_t seed)
{
	uint64_t in[32 * 8], out[32 * 8] = {0};
	for (int i = 0; i < 32 * 8; i++)
		in[i] = mix(seed ^ (uint64_t)i);
	int words = 0;
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
		uint64_t masks[4] = {mix(seed), mix(~seed), 0, 0};
		hold_avx512(in, out, masks);
		CHECK(masks[0] == masks[2] && masks[1] == masks[3], "mask registers k1, k7 hold %llx, %llx in place of %llx, %llx",
		      (unsigned long long)masks[2], (unsigned long long)masks[3], (unsigned long long)masks[0], (unsigned long long)masks[1]);
		words = 32 * 8;
	} else if (__builtin_cpu_supports("avx")) {
		hold_avx(in, out);
		words = 16 * 4;
	}
	if (breaking("vectors") && words)
		out[5] ^= 1;
	for (int i = 0; i < words; i++)
		CHECK(in[i] == out[i], "vector register word %d holds %llx in place of %llx", i, (unsigned long long)out[i], (unsigned long long)in[i]);
}

/* Something on the x87 stack, and rounding modes there and in MXCSR, over a spin. */
static void floating_point(int index)
{
	static const int modes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
	fesetround(modes[index % 4]);
	long double in = 1.0L + index / 1024.0L, out = 0;
	__asm__ volatile("fldt %1\n\t mov $10000000, %%ecx\n\t 1: dec %%ecx\n\t jnz 1b\n\t fstpt %0" : "=m"(out) : "m"(in) : "rcx", "cc");
	CHECK(in == out, "the x87 stack holds another number");
	uint32_t mxcsr = _mm_getcsr();
	uint16_t control;
	__asm__ volatile("fnstcw %0" : "=m"(control));
	uint32_t rounding = (uint32_t)modes[index % 4];
	CHECK((mxcsr >> 3 & 0xc00) == rounding, "MXCSR is %x where rounding %x was set", mxcsr, rounding);
	CHECK((control & 0xc00u) == rounding, "the x87 control word is %x where rounding %x was set", control, rounding);
}

struct lane {
	pthread_t thread;
	int index;
	pid_t tid;
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	uint64_t token;
} lanes[THREADS];

static void *worker(void *argument)
{
	struct lane *lane = argument;
	lane->tid = (pid_t)syscall(SYS_gettid);
	local_value = mix(nonce + (uint64_t)lane->index);
	memset(local_block, lane->index + 1, sizeof local_block);
	pthread_t self = pthread_self();
	char name[16];
	snprintf(name, sizeof name, "lane-%d", lane->index);
	pthread_setname_np(self, name);
	sigset_t mine, seen;
	sigemptyset(&mine);
	sigaddset(&mine, SIGRTMIN + lane->index);
	sigaddset(&mine, SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &mine, NULL);
	pthread_barrier_wait(&all_stand);

	for (uint64_t round = 0; !stop; round++) {
		general_registers(mix(round) + (uint64_t)lane->index);
		vector_registers(mix(~round) + (uint64_t)lane->index);
		floating_point(lane->index);

		CHECK(local_value == mix(nonce + (uint64_t)lane->index), "thread-local value of lane %d", lane->index);
		for (size_t i = 0; i < sizeof local_block; i++)
			CHECK(local_block[i] == lane->index + 1, "thread-local block of lane %d at %zu", lane->index, i);
		CHECK(pthread_self() == self && syscall(SYS_gettid) == lane->tid, "lane %d has another thread id", lane->index);
		char now[16];
		pthread_getname_np(self, now, sizeof now);
		CHECK(!strcmp(now, name), "lane %d is called %s", lane->index, now);
		if (breaking("mask") && round == 2)
			sigdelset(&mine, SIGUSR1), pthread_sigmask(SIG_SETMASK, &mine, NULL), sigaddset(&mine, SIGUSR1);
		pthread_sigmask(SIG_SETMASK, NULL, &seen);
		for (int number = 1; number < NSIG; number++)
			CHECK(sigismember(&seen, number) == sigismember(&mine, number), "lane %d: signal %d in the mask", lane->index, number);

		/* A wait that nobody ends: it must last as long as was asked. */
		int64_t asked = 30 * MS, start = now_ns();
		struct timespec until = span(start + asked);
		pthread_mutex_lock(&lane->mutex);
		pthread_cond_t lonely;
		pthread_condattr_t attributes;
		pthread_condattr_init(&attributes);
		pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
		pthread_cond_init(&lonely, &attributes);
		int error;
		while ((error = pthread_cond_timedwait(&lonely, &lane->mutex, &until)) == 0)
			;
		CHECK(error == ETIMEDOUT, "pthread_cond_timedwait says %d", error);
		int64_t took = now_ns() - start;
		CHECK(took >= asked && took < asked + late_ms * MS, "pthread_cond_timedwait of 30 ms took %lld us", (long long)took / 1000);
		pthread_cond_destroy(&lonely);
		pthread_mutex_unlock(&lane->mutex);

		/* The robust mutex that a thread left locked all along. */
		struct timespec soon;
		clock_gettime(CLOCK_REALTIME, &soon);
		soon = span(soon.tv_sec * SECOND + soon.tv_nsec + 5 * MS);
		error = pthread_mutex_timedlock(&held, &soon);
		CHECK(error == ETIMEDOUT || (stop && (error == EOWNERDEAD || error == ENOTRECOVERABLE)), "the held robust mutex says %d", error);
		if (error == EOWNERDEAD) {
			pthread_mutex_consistent(&held);
			pthread_mutex_unlock(&held);
		}
		sched_yield();
	}
	return NULL;
}

/* A token goes round by condition variables without deadlines: one lost wake-up and it stands for ever. */
static _Atomic uint64_t turns;
static pthread_mutex_t ring = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn[4] = {PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER};

static void *passer(void *argument)
{
	uintptr_t me = (uintptr_t)argument;
	pthread_mutex_lock(&ring);
	while (!stop) {
		while (turns % 4 != me && !stop)
			pthread_cond_wait(&turn[me], &ring);
		if (stop)
			break;
		if (breaking("token") && turns == 1000)
			pthread_cond_wait(&turn[me], &ring);
		turns++;
		pthread_cond_signal(&turn[turns % 4]);
	}
	pthread_mutex_unlock(&ring);
	return NULL;
}

static _Atomic bool owner_may_end;
static void *owner(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&held);
	pthread_barrier_wait(&all_stand);
	while (!owner_may_end)
		doze(5 * MS);
	return NULL;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pthread_mutexattr_t robust;
	pthread_mutexattr_init(&robust);
	pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&held, &robust);
	pthread_barrier_init(&all_stand, NULL, THREADS + 2);
	pthread_t owning, passers[4];
	CHECK(pthread_create(&owning, NULL, owner, NULL) == 0, "set-up failed: pthread_create");
	for (uintptr_t i = 0; i < 4; i++)
		CHECK(pthread_create(&passers[i], NULL, passer, (void *)i) == 0, "set-up failed: pthread_create");
	for (int i = 0; i < THREADS; i++) {
		lanes[i].index = i;
		pthread_mutex_init(&lanes[i].mutex, &robust);
		CHECK(pthread_create(&lanes[i].thread, NULL, worker, &lanes[i]) == 0, "set-up failed: pthread_create");
	}
	pthread_barrier_wait(&all_stand);
	ready();
	uint64_t seen = turns;
	int64_t moved = now_ns();
	while (goes_on()) {
		doze(20 * MS);
		if (turns != seen) {
			seen = turns;
			moved = now_ns();
		}
		CHECK(now_ns() - moved < late_ms * MS, "the token stands at turn %llu: a wake-up was lost", (unsigned long long)seen);
	}
	stop = true;
	pthread_mutex_lock(&ring);
	for (int i = 0; i < 4; i++)
		pthread_cond_broadcast(&turn[i]);
	pthread_mutex_unlock(&ring);
	for (int i = 0; i < 4; i++)
		pthread_join(passers[i], NULL);
	for (int i = 0; i < THREADS; i++)
		pthread_join(lanes[i].thread, NULL);
	owner_may_end = true;
	pthread_join(owning, NULL);
	/* The kernel walks the dead thread's robust list: the heir must be told. */
	int error = pthread_mutex_lock(&held);
	CHECK(error == EOWNERDEAD, "a robust mutex whose owner ended says %d", error);
	return finished("turns=%llu", (unsigned long long)turns);
}
