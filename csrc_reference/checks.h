/* What every file needs before it may index an array: sizes that fit, pointers that exist, workspaces that were granted. */
#ifndef DOTMOE_CHECKS_H
#define DOTMOE_CHECKS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "dotmoe_reference.h"

/* Elements of an [a, b] array of 16-byte elements at most, or -1 where its bytes would not fit a pointer difference.
 * Tested before multiplying: a signed overflow is undefined behaviour. A negative factor (also of an inner call) gives -1. */
static inline int64_t count_of(int64_t a, int64_t b) {
    const int64_t most = (int64_t)((uint64_t)(PTRDIFF_MAX < INT64_MAX ? PTRDIFF_MAX : INT64_MAX) / 16u);
    if (a < 0 || b < 0 || (b > 0 && a > most / b)) return -1;
    return a * b;
}

/* Whether an array that holds n elements is missing; an empty array needs no address. */
static inline int missing(const void *array, int64_t n) { return n > 0 && array == NULL; }

/* n zeros, or NULL. At least one element: malloc(0) may return NULL without having failed. */
static inline double *new_doubles(int64_t n) { return calloc(n > 0 ? (size_t)n : 1u, sizeof(double)); }
static inline int64_t *new_integers(int64_t n) { return calloc(n > 0 ? (size_t)n : 1u, sizeof(int64_t)); }

static inline void set_zero(double *array, int64_t n) {
    for (int64_t i = 0; i < n; i++) array[i] = 0.0;
}

static inline int all_finite(const double *array, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(array[i])) return 0;
    }
    return 1;
}

static inline int all_within(const int64_t *array, int64_t n, int64_t low, int64_t high) {
    for (int64_t i = 0; i < n; i++) {
        if (array[i] < low || array[i] > high) return 0;
    }
    return 1;
}

#endif
