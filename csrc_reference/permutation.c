/* Permutation: expert_of [F] -> the order in which the neurons are stored, and the dense weights in that order as blocks.
 *
 * A counting sort: position of neuron i = neurons of lower experts + earlier neurons of the same expert. No weight is changed,
 * copied twice or dropped, so with K = E the blocks compute the dense FFN. */
#include "checks.h"

int dotmoe_neuron_order(int64_t F, int64_t E, const int64_t *expert_of, int64_t *order) {
    if (F < 0 || E < 1 || count_of(F, 1) < 0 || count_of(E, 1) < 0 || E == INT64_MAX) return DOTMOE_BAD_SIZE;
    if (missing(expert_of, F) || missing(order, F)) return DOTMOE_NULL;
    if (!all_within(expert_of, F, 0, E - 1)) return DOTMOE_BAD_VALUE;
    int64_t *next = new_integers(E + 1); /* next free position of each expert */
    if (next == NULL) return DOTMOE_NO_MEMORY;
    for (int64_t i = 0; i < F; i++) next[expert_of[i] + 1]++;
    for (int64_t e = 0; e < E; e++) next[e + 1] += next[e];
    for (int64_t i = 0; i < F; i++) order[next[expert_of[i]]++] = i;
    free(next);
    return DOTMOE_OK;
}

int dotmoe_inverse_order(int64_t F, const int64_t *order, int64_t *inverse) {
    if (count_of(F, 1) < 0) return DOTMOE_BAD_SIZE;
    if (missing(order, F) || missing(inverse, F)) return DOTMOE_NULL;
    if (!all_within(order, F, 0, F - 1)) return DOTMOE_BAD_VALUE;
    int64_t *seen = new_integers(F); /* a flag a neuron, so that a repeated one is found before anything is written */
    if (seen == NULL) return DOTMOE_NO_MEMORY;
    int repeated = 0;
    for (int64_t n = 0; n < F; n++) repeated |= seen[order[n]]++ > 0;
    free(seen);
    if (repeated) return DOTMOE_BAD_VALUE;
    for (int64_t n = 0; n < F; n++) inverse[order[n]] = n;
    return DOTMOE_OK;
}

static int check_blocks(int64_t F, int64_t E, int64_t H, const int64_t *order) {
    if (F < 1 || E < 1 || H < 1 || F % E != 0 || count_of(F, 2) < 0 || count_of(2 * F, H) < 0) return DOTMOE_BAD_SIZE;
    if (order == NULL) return DOTMOE_NULL;
    return all_within(order, F, 0, F - 1) ? DOTMOE_OK : DOTMOE_BAD_VALUE;
}

/* Offsets of position n = e s + m, hidden h: row m of the gate half of expert e, and column m of its down block. */
static int64_t gate_at(int64_t n, int64_t s, int64_t H, int64_t h) { return ((n / s) * 2 * s + n % s) * H + h; }
static int64_t down_at(int64_t n, int64_t s, int64_t H, int64_t h) { return ((n / s) * H + h) * s + n % s; }

int dotmoe_expert_blocks(int64_t F, int64_t E, int64_t H, const int64_t *order, const double *gate_proj, const double *up_proj,
                         const double *down_proj, double *gate_up_proj, double *down_blocks) {
    const int status = check_blocks(F, E, H, order);
    if (status != DOTMOE_OK) return status;
    if (!gate_proj || !up_proj || !down_proj || !gate_up_proj || !down_blocks) return DOTMOE_NULL;
    const int64_t s = F / E;
    for (int64_t n = 0; n < F; n++) {
        for (int64_t h = 0; h < H; h++) {
            gate_up_proj[gate_at(n, s, H, h)] = gate_proj[order[n] * H + h];
            gate_up_proj[gate_at(n, s, H, h) + s * H] = up_proj[order[n] * H + h]; /* the up half follows */
            down_blocks[down_at(n, s, H, h)] = down_proj[h * F + order[n]];
        }
    }
    return DOTMOE_OK;
}

int dotmoe_dense_weights(int64_t F, int64_t E, int64_t H, const int64_t *order, const double *gate_up_proj,
                         const double *down_blocks, double *gate_proj, double *up_proj, double *down_proj) {
    const int status = check_blocks(F, E, H, order);
    if (status != DOTMOE_OK) return status;
    if (!gate_proj || !up_proj || !down_proj || !gate_up_proj || !down_blocks) return DOTMOE_NULL;
    const int64_t s = F / E;
    for (int64_t n = 0; n < F; n++) {
        for (int64_t h = 0; h < H; h++) {
            gate_proj[order[n] * H + h] = gate_up_proj[gate_at(n, s, H, h)];
            up_proj[order[n] * H + h] = gate_up_proj[gate_at(n, s, H, h) + s * H];
            down_proj[h * F + order[n]] = down_blocks[down_at(n, s, H, h)];
        }
    }
    return DOTMOE_OK;
}
