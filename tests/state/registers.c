/* Registers of the processor, while it works. */
#include "state.h"

#include "registers.h"

#include <cpuid.h>
#include <fenv.h>
#include <pthread.h>
#include <stddef.h>

/* Holds a value in registers of one kind in a loop that makes no call, until another thread says so. */
static volatile int stop, running;
static pthread_t holder;
static volatile int differs;

static void hold(void *(*body)(void *))
{
	CHECK(pthread_create(&holder, NULL, body, NULL) == 0, "no thread");
	while (!running)
		usleep(1000);
}
static void release(void)
{
	stop = 1;
	CHECK(pthread_join(holder, NULL) == 0, "can't be joined");
	CHECK(!differs, "%d of them differ", differs);
}

#define HOLDER(id) \
	static void id##_setup(void) { hold(id##_body); } \
	static void id##_check(void) { release(); } \
	static void id##_spoil(void) { differs = 1; } \
	STATE(id)

static void *registers_general_body(void *data)
{
	unsigned long sum;
	(void)data;
	running = 1;
	__asm__ volatile(
		"movq $0x1111, %%rax\n movq $0x2222, %%rbx\n movq $0x3333, %%rcx\n movq $0x4444, %%rdx\n movq $0x5555, %%rsi\n"
		"movq $0x6666, %%rdi\n movq $0x7777, %%r8\n movq $0x8888, %%r9\n movq $0x9999, %%r10\n movq $0xaaaa, %%r11\n"
		"movq $0xbbbb, %%r12\n movq $0xcccc, %%r13\n movq $0xdddd, %%r14\n movq $0xeeee, %%r15\n"
		"1: cmpl $0, %1\n pause\n je 1b\n"
		"addq %%rbx, %%rax\n rolq $3, %%rax\n addq %%rcx, %%rax\n rolq $3, %%rax\n addq %%rdx, %%rax\n rolq $3, %%rax\n"
		"addq %%rsi, %%rax\n rolq $3, %%rax\n addq %%rdi, %%rax\n rolq $3, %%rax\n addq %%r8, %%rax\n rolq $3, %%rax\n"
		"addq %%r9, %%rax\n rolq $3, %%rax\n addq %%r10, %%rax\n rolq $3, %%rax\n addq %%r11, %%rax\n rolq $3, %%rax\n"
		"addq %%r12, %%rax\n rolq $3, %%rax\n addq %%r13, %%rax\n rolq $3, %%rax\n addq %%r14, %%rax\n rolq $3, %%rax\n"
		"addq %%r15, %%rax\n movq %%rax, %0\n"
		: "=m"(sum) : "m"(stop)
		: "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	unsigned long wanted = 0x1111;
	for (unsigned long value = 0x2222; value <= 0xeeee; value += 0x1111) {
		wanted += value;
		if (value != 0xeeee)
			wanted = wanted << 3 | wanted >> 61;
	}
	if (sum != wanted)
		differs++;
	return NULL;
}
HOLDER(registers_general)

/* A program that has the processor trap after each of its own instructions. */
static volatile unsigned long traps;
static void on_trap(int signal) { (void)signal; traps++; }
static void *single_steps_body(void *data)
{
	(void)data;
	signal(SIGTRAP, on_trap);
	running = 1;
	__asm__ volatile("pushfq\n orq $0x100, (%%rsp)\n popfq\n 1: cmpl $0, %0\n je 1b\n" : : "m"(stop) : "memory", "cc");
	unsigned long before = traps;
	__asm__ volatile("nop\n nop\n nop\n pushfq\n andq $~0x100, (%%rsp)\n popfq\n" : : : "memory", "cc");
	if (traps < before + 3)
		differs++;
	return NULL;
}
HOLDER(single_steps)

/* x87: a full stack, a control word of its own, and an exception that waits. */
static void *registers_x87_body(void *data)
{
	static const unsigned short control = 0x0c7b; /* round to zero, double precision; the zero divide is not masked */
	unsigned short now, status;
	double value = 0;
	(void)data;
	running = 1;
	__asm__ volatile("fninit\n fldcw %0\n fldpi\n fldl2e\n fld1\n fldz\n" :: "m"(control));
	while (!stop)
		;
	__asm__ volatile("fnstcw %0\n fnstsw %1\n fstp %%st\n fstp %%st\n fstp %%st\n fstpl %2\n" : "=m"(now), "=m"(status), "=m"(value));
	differs += now != control;
	differs += (status >> 11 & 7) != 4;
	differs += value < 3.14159 || value > 3.1416;
	__asm__ volatile("fninit");
	return NULL;
}
HOLDER(registers_x87)

static volatile int trapped;
static void on_exception(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	trapped = info->si_code;
	__asm__ volatile("fninit");
	pthread_exit(NULL);
}
static void *exception_waits_body(void *data)
{
	static const unsigned short control = 0x037b;
	(void)data;
	running = 1;
	__asm__ volatile("fninit\n fldcw %0\n fld1\n fldz\n fdivrp\n" :: "m"(control));
	while (!stop)
		;
	__asm__ volatile("fwait");
	differs++;
	return NULL;
}
static void exception_waits_setup(void)
{
	struct sigaction action = {.sa_sigaction = on_exception, .sa_flags = SA_SIGINFO};
	MUST(sigaction(SIGFPE, &action, NULL));
	hold(exception_waits_body);
}
static void exception_waits_check(void) { release(); CHECK(trapped == FPE_FLTDIV, "it trapped with %d", trapped); }
static void exception_waits_spoil(void) { differs = 1; }
STATE(exception_waits)

static void *registers_sse_body(void *data)
{
	unsigned mxcsr = 0x1f80 | 0x6000 | 0x8000 | 0x0040, now; /* to zero, flush, denormals are zero */
	float results[8][4];
	(void)data;
	running = 1;
	__asm__ volatile(
		"ldmxcsr %2\n"
		"movl $7, %%eax\n movd %%eax, %%xmm0\n pshufd $0, %%xmm0, %%xmm0\n"
		"movaps %%xmm0, %%xmm1\n paddd %%xmm0, %%xmm1\n movaps %%xmm1, %%xmm15\n paddd %%xmm0, %%xmm15\n"
		"1: cmpl $0, %3\n pause\n je 1b\n"
		"stmxcsr %1\n movups %%xmm0, (%0)\n movups %%xmm1, 16(%0)\n movups %%xmm15, 32(%0)\n"
		:: "r"(results), "m"(now), "m"(mxcsr), "m"(stop) : "eax", "xmm0", "xmm1", "xmm15", "memory", "cc");
	int words[12];
	memcpy(words, results, sizeof words);
	for (int i = 0; i < 12; i++)
		differs += words[i] != 7 * (i / 4 + 1);
	differs += now != mxcsr;
	return NULL;
}
HOLDER(registers_sse)

static bool has_avx512(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx512f"); }
static bool has_avx(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx"); }

__attribute__((target("avx"))) static void *registers_avx_body(void *data)
{
	double results[8];
	(void)data;
	if (!has_avx()) {
		running = 1;
		return NULL;
	}
	static const double source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
	running = 1;
	__asm__ volatile(
		"vmovupd (%1), %%ymm3\n vmovupd 32(%1), %%ymm14\n"
		"1: cmpl $0, %2\n pause\n je 1b\n"
		"vmovupd %%ymm3, (%0)\n vmovupd %%ymm14, 32(%0)\n vzeroupper\n"
		:: "r"(results), "r"(source), "m"(stop) : "xmm3", "xmm14", "memory", "cc");
	differs += memcmp(results, source, sizeof source) != 0;
	return NULL;
}
HOLDER(registers_avx)

__attribute__((target("avx512f"))) static void *registers_avx512_body(void *data)
{
	static unsigned char source[128], results[128];
	unsigned masks[2] = {0};
	(void)data;
	if (!has_avx512()) {
		running = 1;
		return NULL;
	}
	for (int i = 0; i < 128; i++)
		source[i] = (unsigned char)(i * 37 + 11);
	running = 1;
	__asm__ volatile(
		"vmovdqu64 (%1), %%zmm5\n vmovdqu64 64(%1), %%zmm29\n"
		"movl $0xbeef, %%eax\n kmovw %%eax, %%k1\n movl $0x1234, %%eax\n kmovw %%eax, %%k7\n"
		"1: cmpl $0, %2\n pause\n je 1b\n"
		"vmovdqu64 %%zmm5, (%0)\n vmovdqu64 %%zmm29, 64(%0)\n"
		"kmovw %%k1, %%eax\n movl %%eax, (%3)\n kmovw %%k7, %%eax\n movl %%eax, 4(%3)\n vzeroupper\n"
		:: "r"(results), "r"(source), "m"(stop), "r"(masks) : "eax", "xmm5", "memory", "cc");
	differs += memcmp(results, source, sizeof source) != 0;
	differs += masks[0] != 0xbeef || masks[1] != 0x1234;
	return NULL;
}
HOLDER(registers_avx512)

/* Flags: direction, and alignment checks that stay on. */
static void *registers_flags_body(void *data)
{
	unsigned long flags;
	(void)data;
	running = 1;
	__asm__ volatile(
		"std\n pushfq\n orq $0x40000, (%%rsp)\n popfq\n"
		"1: cmpl $0, %1\n pause\n je 1b\n"
		"pushfq\n popq %0\n cld\n pushfq\n andq $~0x40000, (%%rsp)\n popfq\n"
		: "=&r"(flags) : "m"(stop) : "memory", "cc");
	differs += (flags & 0x400) == 0;
	differs += (flags & 0x40000) == 0;
	return NULL;
}
HOLDER(registers_flags)

static void rounding_setup(void) { CHECK(fesetround(FE_UPWARD) == 0, "no such rounding"); }
static void rounding_check(void)
{
	volatile double one = 1, three = 3;
	double up = one / three;
	CHECK(fegetround() == FE_UPWARD, "it rounds otherwise");
	fesetround(FE_DOWNWARD);
	CHECK(up > one / three, "up is not above down");
}
static void rounding_spoil(void) { fesetround(FE_TONEAREST); }
STATE(rounding)

static void exceptions_noted_setup(void) { feclearexcept(FE_ALL_EXCEPT); feraiseexcept(FE_DIVBYZERO | FE_INEXACT); }
static void exceptions_noted_check(void) { CHECK(fetestexcept(FE_DIVBYZERO) && fetestexcept(FE_INEXACT) && !fetestexcept(FE_INVALID), "others are"); }
static void exceptions_noted_spoil(void) { feclearexcept(FE_ALL_EXCEPT); }
STATE(exceptions_noted)

static __thread unsigned long own_value = 11;
static void *own_body(void *data) { (void)data; own_value = 33; running = 1; while (!stop) ; differs += own_value != 33; return NULL; }
static void thread_local_setup(void) { own_value = 22; hold(own_body); }
static void thread_local_check(void) { CHECK(own_value == 22, "it is %lu", own_value); release(); }
static void thread_local_spoil(void) { own_value = 23; }
STATE(thread_local)

/* All registers at once, as XSAVE knows them. */
#define AREA_BYTES 8192
#define GENERAL 6

struct held {
	unsigned char before[AREA_BYTES], after[AREA_BYTES];
	uint64_t general_before[GENERAL], general_after[GENERAL];
	uint64_t components;
	volatile int stop, runs;
	pthread_t thread;
	struct held *next;
} __attribute__((aligned(64)));

static struct held *all_held;

/* Where the areas of a component differ from each other, or are to be filled: components 0 and 1 lie in the legacy region. */
struct span { size_t at, length; };

static struct span component_span(unsigned component)
{
	/* The register stack without its pointers to instructions, which some processors keep only with an exception. */
	if (component == 0)
		return (struct span){32, 128};
	if (component == 1)
		return (struct span){160, 256};
	unsigned length, at, c, d;
	__cpuid_count(13, component, length, at, c, d);
	return (struct span){at, length};
}

static uint64_t usable_components(void)
{
	unsigned a, b, c, d;
	__cpuid_count(1, 0, a, b, c, d);
	if (!(c >> 27 & 1))
		return 0;
	__asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	/* x87, SSE, AVX and the three of AVX-512. Bounds registers are gone, protection keys would lock us out, tiles are asked for. */
	return (a | (uint64_t)d << 32) & 0xe7;
}

static void *held_body(void *argument)
{
	struct held *held = argument;
	static const struct timespec step = {.tv_nsec = 5000000};
	unsigned low = (unsigned)held->components, high = (unsigned)(held->components >> 32);
	held->runs = 1;
	/* r8 and r9 are ours, the call takes rax, rcx, rdi, rsi and r11, and the rest is what must stay. */
	register struct held *self __asm__("r8") = held;
	register const struct timespec *sleep __asm__("r9") = &step;
	__asm__ volatile(
		"xrstor64 %c[before](%[self])\n"
		"movq %c[general](%[self]), %%rbx\n movq %c[general]+8(%[self]), %%r10\n movq %c[general]+16(%[self]), %%r12\n"
		"movq %c[general]+24(%[self]), %%r13\n movq %c[general]+32(%[self]), %%r14\n movq %c[general]+40(%[self]), %%r15\n"
		"1: movl %[nanosleep], %%eax\n movq %[sleep], %%rdi\n xorl %%esi, %%esi\n syscall\n"
		"cmpl $0, %c[stop](%[self])\n je 1b\n"
		"movq %%rbx, %c[found](%[self])\n movq %%r10, %c[found]+8(%[self])\n movq %%r12, %c[found]+16(%[self])\n"
		"movq %%r13, %c[found]+24(%[self])\n movq %%r14, %c[found]+32(%[self])\n movq %%r15, %c[found]+40(%[self])\n"
		"movl %c[mask](%[self]), %%eax\n movl %c[mask]+4(%[self]), %%edx\n"
		"xsave64 %c[after](%[self])\n"
		: "+a"(low), "+d"(high)
		: [self] "r"(self), [sleep] "r"(sleep), [nanosleep] "i"(SYS_nanosleep), [before] "i"(offsetof(struct held, before)),
		  [after] "i"(offsetof(struct held, after)), [general] "i"(offsetof(struct held, general_before)),
		  [found] "i"(offsetof(struct held, general_after)), [stop] "i"(offsetof(struct held, stop)),
		  [mask] "i"(offsetof(struct held, components))
		: "rbx", "rcx", "rsi", "rdi", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	return NULL;
}

void registers_hold(uint64_t seed)
{
	uint64_t components = usable_components();
	if (!components)
		return;
	struct held *held = aligned_alloc(64, sizeof *held);
	CHECK(held, "no memory for registers");
	memset(held, 0, sizeof *held);
	held->components = components;
	/* What a program may have: the default control words, and a mask for exceptions that is our own. */
	held->before[0] = 0x7f, held->before[1] = 0x0c;
	unsigned mxcsr = 0x9f80;
	memcpy(held->before + 24, &mxcsr, sizeof mxcsr);
	memcpy(held->before + 512, &components, sizeof components);
	for (unsigned component = 0; component < 63; component++) {
		struct span span = components >> component & 1 ? component_span(component) : (struct span){0, 0};
		CHECK(span.at + span.length <= AREA_BYTES, "component %u ends at %zu", component, span.at + span.length);
		for (size_t i = 0; i < span.length; i++)
			/* The upper six bytes of each register of x87 are nobody's. */
			if (component != 0 || i % 16 < 10)
				held->before[span.at + i] = (unsigned char)((seed = seed * 6364136223846793005u + 1442695040888963407u) >> 56);
	}
	for (size_t i = 0; i < GENERAL; i++)
		held->general_before[i] = seed = seed * 6364136223846793005u + 1442695040888963407u;
	held->next = all_held;
	if (pthread_create(&held->thread, NULL, held_body, held)) {
		free(held);
		return;
	}
	all_held = held;
	while (!held->runs)
		usleep(1000);
}

void registers_compare(void)
{
	for (struct held *held = all_held; held; held = held->next) {
		held->stop = 1;
		CHECK(pthread_join(held->thread, NULL) == 0, "can't be joined");
		for (unsigned component = 0; component < 63; component++)
			if (held->components >> component & 1) {
				struct span span = component_span(component);
				CHECK(!memcmp(held->before + span.at, held->after + span.at, span.length), "registers of component %u differ", component);
			}
		CHECK(!memcmp(held->before, held->after, 2), "the control word of x87 differs");
		CHECK(!memcmp(held->before + 24, held->after + 24, 4), "mxcsr differs");
		CHECK(!memcmp(held->general_before, held->general_after, sizeof held->general_before), "general registers differ");
	}
	all_held = NULL;
}

void registers_forget(void) { all_held = NULL; }

static void registers_all_setup(void)
{
	registers_hold(1);
	registers_hold(2);
}
static void registers_all_check(void) { registers_compare(); }
static void registers_all_spoil(void)
{
	/* Where the processor has no XSAVE there is nothing to spoil, and nothing to see. */
	CHECK(all_held, "differs anyway: there is nothing to look at");
	all_held->before[160]++;
}
STATE(registers_all)
