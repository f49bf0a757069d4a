/* Random state; see random.c. */
#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>

/* Does not return. */
int random_state(uint64_t seed, unsigned count, const char *skip);

#endif
