/* Rounding: scores [F, E] -> expert_of [F], exactly capacity[e] neurons an expert, by two algorithms that always agree.
 *
 * The pairs (neuron, expert) have one strict order: score descending, then row-major index. Greedy walks down that order.
 * Neurons and experts all rank each other by it, so the stable matching is unique and greedy finds it: the best pair left is
 * each other's first choice. Deferred acceptance finds a stable matching in any order of proposals, hence the same one, and
 * needs no sort of F E pairs. Holding is essential: an expert that accepted for good would keep early, worse proposers. */
#include "checks.h"

typedef struct {
    double score;
    int64_t index; /* i * E + e */
} pair;

static int by_score_then_index(const void *left, const void *right) {
    const pair *a = left, *b = right;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    return (a->index > b->index) - (a->index < b->index);
}

/* Checks the arguments and resolves capacity NULL into room [E], which the caller frees. */
static int check_rounding(int64_t F, int64_t E, const double *scores, const int64_t *capacity, const int64_t *expert_of,
                          int64_t **room) {
    const int64_t n = count_of(F, E);
    int64_t left = F;
    if (F < 1 || E < 1 || n < 0) return DOTMOE_BAD_SIZE;
    if (!scores || !expert_of) return DOTMOE_NULL;
    for (int64_t j = 0; j < n; j++) {
        if (isnan(scores[j])) return DOTMOE_BAD_VALUE;
    }
    for (int64_t e = 0; e < E && capacity != NULL; e++) {
        if (capacity[e] < 0 || capacity[e] > left) return DOTMOE_BAD_VALUE; /* subtracting: a sum could overflow */
        left -= capacity[e];
    }
    if (capacity != NULL && left != 0) return DOTMOE_BAD_VALUE;
    *room = new_integers(E);
    if (*room == NULL) return DOTMOE_NO_MEMORY;
    for (int64_t e = 0; e < E; e++) (*room)[e] = capacity != NULL ? capacity[e] : F / E + (e < F % E);
    return DOTMOE_OK;
}

int dotmoe_greedy_assignment(int64_t F, int64_t E, const double *scores, const int64_t *capacity, int64_t *expert_of) {
    int64_t *room = NULL;
    const int status = check_rounding(F, E, scores, capacity, expert_of, &room);
    if (status != DOTMOE_OK) return status;
    pair *pairs = malloc((size_t)(F * E) * sizeof *pairs); /* count_of left room for 16 bytes an element */
    if (pairs == NULL) {
        free(room);
        return DOTMOE_NO_MEMORY;
    }
    for (int64_t j = 0; j < F * E; j++) pairs[j] = (pair){scores[j], j};
    qsort(pairs, (size_t)(F * E), sizeof *pairs, by_score_then_index);
    for (int64_t i = 0; i < F; i++) expert_of[i] = -1;
    for (int64_t j = 0, left = F; left > 0; j++) {
        const int64_t i = pairs[j].index / E, e = pairs[j].index % E;
        if (expert_of[i] >= 0 || room[e] == 0) continue;
        expert_of[i] = e;
        room[e]--, left--;
    }
    free(pairs), free(room);
    return DOTMOE_OK;
}

/* Whether pair (i, e) comes before pair (j, d) in the strict order. */
static int prefers(int64_t E, const double *scores, int64_t i, int64_t e, int64_t j, int64_t d) {
    const double a = scores[i * E + e], b = scores[j * E + d];
    return a != b ? a > b : i * E + e < j * E + d;
}

/* The expert that neuron i likes best among those after `last`, its latest refusal (-1: none yet). One scan, no memory. */
static int64_t next_choice(int64_t E, const double *scores, int64_t i, int64_t last) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; e++) {
        if (last >= 0 && !prefers(E, scores, i, last, i, e)) continue; /* refused already, or is `last` */
        if (best < 0 || prefers(E, scores, i, e, i, best)) best = e;
    }
    return best;
}

/* The neurons an expert holds, as a binary heap [count] whose root is the one it would give up first. */
static void sift_down(int64_t E, const double *scores, int64_t e, int64_t *heap, int64_t count) {
    for (int64_t at = 0, worst = 0;; at = worst) {
        for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < count; child++) {
            if (prefers(E, scores, heap[worst], e, heap[child], e)) worst = child;
        }
        if (worst == at) return;
        const int64_t neuron = heap[at];
        heap[at] = heap[worst], heap[worst] = neuron;
    }
}

static void sift_up(int64_t E, const double *scores, int64_t e, int64_t *heap, int64_t at) {
    while (at > 0 && prefers(E, scores, heap[(at - 1) / 2], e, heap[at], e)) {
        const int64_t parent = (at - 1) / 2, neuron = heap[at];
        heap[at] = heap[parent], heap[parent] = neuron;
        at = parent;
    }
}

/* Neuron i proposes to expert e, which holds *count of its `room` places. Returns the neuron that is free afterwards: the
 * proposer itself, the one it displaced, or -1. */
static int64_t propose(int64_t E, const double *scores, int64_t i, int64_t e, int64_t room, int64_t *heap, int64_t *count) {
    if (*count < room) {
        heap[*count] = i;
        sift_up(E, scores, e, heap, (*count)++);
        return -1;
    }
    if (room == 0 || prefers(E, scores, heap[0], e, i, e)) return i;
    const int64_t displaced = heap[0];
    heap[0] = i;
    sift_down(E, scores, e, heap, *count);
    return displaced;
}

int dotmoe_proposal_assignment(int64_t F, int64_t E, const double *scores, const int64_t *capacity, int64_t *expert_of,
                               int64_t *rounds, int64_t *proposals) {
    int64_t *room = NULL, round = 0, total = 0, free_count = F;
    const int status = check_rounding(F, E, scores, capacity, expert_of, &room);
    if (status != DOTMOE_OK) return status;
    /* held [F]: the heaps side by side, expert e's at start[e]; waiting [F]: the free neurons; last [F]: latest refusal */
    int64_t *held = new_integers(F), *waiting = new_integers(F), *last = new_integers(F);
    int64_t *start = new_integers(E), *count = new_integers(E);
    if (!held || !waiting || !last || !start || !count) {
        free(held), free(waiting), free(last), free(start), free(count), free(room);
        return DOTMOE_NO_MEMORY;
    }
    for (int64_t e = 1; e < E; e++) start[e] = start[e - 1] + room[e - 1];
    for (int64_t i = 0; i < F; i++) waiting[i] = i, last[i] = -1;
    for (; free_count > 0; round++) {
        int64_t still_free = 0; /* never ahead of the reader n: a proposal frees one neuron at most */
        for (int64_t n = 0; n < free_count; n++, total++) {
            const int64_t i = waiting[n], e = next_choice(E, scores, i, last[i]);
            const int64_t loser = propose(E, scores, i, e, room[e], held + start[e], &count[e]);
            if (loser < 0) continue;
            last[loser] = e;
            waiting[still_free++] = loser;
        }
        free_count = still_free;
    }
    for (int64_t e = 0; e < E; e++) {
        for (int64_t n = 0; n < count[e]; n++) expert_of[held[start[e] + n]] = e;
    }
    if (rounds != NULL) *rounds = round;
    if (proposals != NULL) *proposals = total;
    free(held), free(waiting), free(last), free(start), free(count), free(room);
    return DOTMOE_OK;
}

int dotmoe_assignment_gap(int64_t F, int64_t E, const double *scores, const int64_t *expert_of, double *gap) {
    const int64_t n = count_of(F, E);
    double sum = 0.0;
    if (F < 1 || E < 1 || n < 0) return DOTMOE_BAD_SIZE;
    if (!scores || !expert_of || !gap) return DOTMOE_NULL;
    if (!all_finite(scores, n) || !all_within(expert_of, F, 0, E - 1)) return DOTMOE_BAD_VALUE;
    for (int64_t i = 0; i < F; i++) {
        double best = scores[i * E];
        for (int64_t e = 1; e < E; e++) best = fmax(best, scores[i * E + e]);
        sum += best - scores[i * E + expert_of[i]]; /* each term >= 0 */
    }
    *gap = sum;
    return DOTMOE_OK;
}
