/* Threads that hold values in every register that a program may use (registers.c). */
#ifndef REGISTERS_H
#define REGISTERS_H

#include <stdint.h>

/* Begins a thread that fills all registers with numbers drawn from `seed`, and then waits in a call again and again. */
void registers_hold(uint64_t seed);
/* Ends all such threads of this process, and fails where a register has another value than at first. */
void registers_compare(void);
/* In a forked process, which has no such thread. */
void registers_forget(void);

#endif
