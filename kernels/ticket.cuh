// How blocks that share a result find out which of them is the last to be done: it adds up what all have left, in an order that does
// not depend on theirs.
#pragma once

#include "device.cuh"

// Whether the caller is the last of `count` blocks that come here: what these wrote in front of a barrier of theirs its block then sees behind
// one. By one thread of each block; the ticket is 0 again when the last has been here.
DEVICE bool take_ticket(int* ticket, int count) {
    __threadfence();
    const bool last = atomicAdd(ticket, 1) == count - 1;
    __threadfence();
    if (last) *ticket = 0;
    return last;
}
