/* What a process can see of itself, as text. */
#ifndef OBSERVE_H
#define OBSERVE_H

#include <stddef.h>

/* Two texts of this size are kept in memory that is in no text. */
#define OBSERVED_BYTES (4u << 20)

/* Begins: makes room, so that looking changes nothing that is looked at. Once, before the state is set up. */
void observe_begin(void);
/* Remembers what is seen now. */
void observe_before(void);
/* Fails with the first line that is not as it was. */
void observe_after(void);

#endif
