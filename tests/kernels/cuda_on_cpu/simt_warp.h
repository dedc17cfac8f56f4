// Warp collectives: every lane of the mask deposits its operands; the last to arrive computes for all.
#pragma once
#include "simt_fibers.h"

namespace simt {

enum Operation { SYNC, SHUFFLE, SHUFFLE_DOWN, SHUFFLE_UP, SHUFFLE_XOR, BALLOT, REDUCE, MMA, LDMATRIX };

// Calls compute(Operands*[32]) once per warp; absent lanes are null.
template <class Operands, class Compute>
static void collective(uint32_t mask, Operation operation, Operands& mine, Compute compute) {
    int lane = current->linear & 31;
    if (!(mask >> lane & 1)) fail("warp collective: the calling lane is not in the mask");
    Meeting& meeting = meetings[(current->linear & ~31) + __builtin_ctz(mask)];
    if (!meeting.arrived) meeting.mask = mask, meeting.operation = operation;
    bool agree = meeting.mask == mask && meeting.operation == operation;
    if (!agree) fail("warp collective: lanes disagree on mask or operation");
    meeting.operands[lane] = &mine;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived != mask) {
        current->state = State::IN_WARP_COLLECTIVE;
        yield();
        return;
    }
    Operands* lanes[32] = {};
    Thread* warp = &threads[current->linear & ~31];
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) lanes[l] = static_cast<Operands*>(meeting.operands[l]);
    compute(lanes);
    meeting.arrived = 0;
    for (int l = 0; l < 32; l++)
        if ((mask >> l & 1) && &warp[l] != current) warp[l].state = State::READY;
}

template <class T> struct Shuffled { T value, result; int argument, width; };

// pick(lane, argument, first lane of the segment, width) names the source lane.
template <class T, class Pick>
static T shuffle(uint32_t mask, Operation operation, T value, int argument, int width, Pick pick) {
    Shuffled<T> mine{value, value, argument, width};
    collective(mask, operation, mine, [&](Shuffled<T>** lanes) {
        for (int l = 0; l < 32; l++) {
            if (!lanes[l]) continue;
            int width = lanes[l]->width, first = l & ~(width - 1);
            int source = pick(l, lanes[l]->argument, first, width);
            if (source < first || source >= first + width) source = l;
            if (lanes[source]) lanes[l]->result = lanes[source]->value;
            else memset(static_cast<void*>(&lanes[l]->result), POISON, sizeof(T));  // undefined on a GPU
        }
    });
    return mine.result;
}

struct Vote { uint32_t predicate, result; };

static uint32_t ballot(uint32_t mask, bool predicate, Operation operation = BALLOT) {
    Vote mine{predicate, 0};
    collective(mask, operation, mine, [](Vote** lanes) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; l++)
            if (lanes[l] && lanes[l]->predicate) votes |= 1u << l;
        for (int l = 0; l < 32; l++)
            if (lanes[l]) lanes[l]->result = votes;
    });
    return mine.result;
}

}  // namespace simt

static inline void __syncwarp(uint32_t mask = ~0u) { simt::ballot(mask, false, simt::SYNC); }
static inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return simt::ballot(mask, predicate); }
static inline int __any_sync(uint32_t mask, int predicate) { return simt::ballot(mask, predicate) != 0; }
static inline int __all_sync(uint32_t mask, int predicate) { return simt::ballot(mask, predicate) == mask; }

template <class T> static T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
    return simt::shuffle(mask, simt::SHUFFLE, value, lane, width,
                         [](int, int lane, int first, int width) { return first + (lane & (width - 1)); });
}
template <class T> static T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
    return simt::shuffle(mask, simt::SHUFFLE_DOWN, value, static_cast<int>(distance), width,
                         [](int lane, int distance, int, int) { return lane + distance; });
}
template <class T> static T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
    return simt::shuffle(mask, simt::SHUFFLE_UP, value, static_cast<int>(distance), width,
                         [](int lane, int distance, int, int) { return lane - distance; });
}
template <class T> static T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32) {
    return simt::shuffle(mask, simt::SHUFFLE_XOR, value, lanes, width,
                         [](int lane, int lanes, int, int) { return lane ^ lanes; });
}
