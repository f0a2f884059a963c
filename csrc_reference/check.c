/* Checks the library against itself: invariants, and every gradient against central finite differences. `make check`.
 * Comparison with an independent implementation is the business of tests/test_csrc_reference.py. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dotmoe_reference.h"

typedef struct {
    uint64_t state; /* of the generator: xorshift64*, so that every run and machine sees the same numbers */
    int passed, failed, seen;
} checker;

static double uniform(checker *c) {
    c->state ^= c->state >> 12, c->state ^= c->state << 25, c->state ^= c->state >> 27;
    return (double)((c->state * UINT64_C(2685821657736338717)) >> 11) / 9007199254740992.0; /* [0, 1) */
}

static void fill(checker *c, double *array, int64_t n, double scale) {
    for (int64_t i = 0; i < n; i++) array[i] = scale * (2.0 * uniform(c) - 1.0);
}

static void expect(checker *c, int holds, const char *what) {
    if (holds) c->passed++;
    else c->failed++, printf("FAILED: %s\n", what);
}

static void expect_close(checker *c, double got, double wanted, double tolerance, const char *what) {
    const int holds = fabs(got - wanted) <= tolerance * (1.0 + fabs(wanted)); /* false for NaN */
    if (!holds) printf("got %.17g, wanted %.17g\n", got, wanted);
    expect(c, holds, what);
}

static void end_group(checker *c, const char *name) {
    printf("%-12s %d checks\n", name, c->passed + c->failed - c->seen);
    c->seen = c->passed + c->failed;
}

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Each of gradient [n] against (loss(v + h) - loss(v - h)) / 2h; loss reads values [n] through its problem. */
static void expect_gradient(checker *c, double (*loss)(const void *), const void *problem, double *values, int64_t n,
                            const double *gradient, const char *what) {
    const double h = 1e-5;
    for (int64_t i = 0; i < n; i++) {
        const double kept = values[i];
        values[i] = kept + h;
        const double above = loss(problem);
        values[i] = kept - h;
        const double below = loss(problem);
        values[i] = kept;
        expect_close(c, gradient[i], (above - below) / (2.0 * h), 1e-7, what);
    }
}

/* ---- transport ---- */

enum { F = 7, E = 3, STEPS = 6 };

typedef struct {
    double affinity[F * E], capacity[E], tau, init[E], g[F * E];
    int64_t steps;
    int final;
} transport;

static double transport_loss(const void *problem) {
    const transport *p = problem;
    double plan[F * E], u[F], v[E], error;
    int64_t taken;
    if (dotmoe_sinkhorn(F, E, p->affinity, p->capacity, p->tau, p->steps, 0.0, p->init, p->final, plan, u, v, &taken, &error,
                        NULL)) {
        return NAN;
    }
    return dot(plan, p->g, F * E);
}

static void check_unrolled(checker *c, int final, int64_t steps) {
    transport p = {.capacity = {1.5, 2.25, 3.25}, .tau = 0.4, .steps = steps, .final = final};
    double plan[F * E], u[F], v[E], error, history[(STEPS + 1) * E], da[F * E], dtau, dc[E], dg[E];
    int64_t taken;
    fill(c, p.affinity, F * E, 1.0), fill(c, p.init, E, 1.0), fill(c, p.g, F * E, 1.0);
    expect(c, !dotmoe_sinkhorn(F, E, p.affinity, p.capacity, p.tau, steps, 0.0, p.init, final, plan, u, v, &taken, &error,
                               history), "sinkhorn runs");
    expect(c, taken == steps, "every step is taken without a tolerance");
    expect(c, !dotmoe_sinkhorn_backward(F, E, p.affinity, p.capacity, p.tau, taken, history, final, p.g, da, &dtau, dc, dg),
           "the adjoint runs");
    expect_gradient(c, transport_loss, &p, p.affinity, F * E, da, "adjoint: d affinity");
    expect_gradient(c, transport_loss, &p, &p.tau, 1, &dtau, "adjoint: d tau");
    expect_gradient(c, transport_loss, &p, p.capacity, E, dc, "adjoint: d capacity");
    expect_gradient(c, transport_loss, &p, p.init, E, dg, "adjoint: d init");
}

static void check_marginals(checker *c) {
    double a[F * E], plan[F * E], u[F], v[E], error, g[F * E], da[F * E], db[F * E], dtau[2], dc[2][E], history[301 * E];
    const double capacity[E] = {0.5, 2.5, 4.0};
    int64_t taken;
    fill(c, a, F * E, 3.0), fill(c, g, F * E, 1.0);
    for (int final = 0; final <= 1; final++) {
        dotmoe_sinkhorn(F, E, a, capacity, 1.0, 300, 1e-12, NULL, final, plan, u, v, &taken, &error, history);
        expect(c, taken > 1 && taken < 300, "the tolerance stops it early");
        expect_close(c, error, 0.0, 1e-11, "the reported error is within the tolerance");
        for (int i = 0; i < F; i++) expect_close(c, plan[i * E] + plan[i * E + 1] + plan[i * E + 2], 1.0, 1e-11, "row sum");
        for (int e = 0; e < E; e++) {
            double sum = 0.0;
            for (int i = 0; i < F; i++) sum += plan[i * E + e];
            expect_close(c, sum, capacity[e], 1e-11, "column sum");
        }
    }
    dotmoe_sinkhorn(F, E, a, capacity, 1.0, 300, 0.0, NULL, DOTMOE_FINAL_ROW, plan, u, v, &taken, &error, history);
    dotmoe_sinkhorn_backward(F, E, a, capacity, 1.0, taken, history, DOTMOE_FINAL_ROW, g, da, &dtau[0], dc[0], NULL);
    expect(c, !dotmoe_sinkhorn_implicit_backward(F, E, a, 1.0, 1e-13, plan, g, db, &dtau[1], dc[1]), "implicit runs");
    for (int j = 0; j < F * E; j++) expect_close(c, db[j], da[j], 1e-10, "implicit = unrolled at the fixed point");
    for (int e = 0; e < E; e++) expect_close(c, dc[1][e], dc[0][e], 1e-10, "implicit: d capacity");
    expect_close(c, dtau[1], dtau[0], 1e-10, "implicit: d tau");
    for (int j = 0; j < F * E; j++) plan[j] = j % E == j / E % E; /* a hard plan: no gradient is left */
    expect(c, !dotmoe_sinkhorn_implicit_backward(F, E, a, 1.0, 1e-12, plan, g, db, NULL, NULL), "implicit on a hard plan");
    for (int j = 0; j < F * E; j++) expect_close(c, db[j], 0.0, 1e-10, "a hard plan has gradient 0");
}

static void check_transport(checker *c) {
    for (int final = 0; final <= 1; final++) {
        check_unrolled(c, final, 0);
        check_unrolled(c, final, 1);
        check_unrolled(c, final, STEPS);
    }
    check_marginals(c);
    end_group(c, "transport");
}

/* ---- rounding and permutation ---- */

static void check_assignment(checker *c, int64_t f, int64_t e, const double *scores, const int64_t *capacity) {
    int64_t greedy[64], proposed[64], count[64] = {0}, rounds, proposals;
    double gap;
    expect(c, !dotmoe_greedy_assignment(f, e, scores, capacity, greedy), "greedy runs");
    expect(c, !dotmoe_proposal_assignment(f, e, scores, capacity, proposed, &rounds, &proposals), "proposals run");
    expect(c, !memcmp(greedy, proposed, (size_t)f * sizeof *greedy), "greedy = deferred acceptance");
    expect(c, rounds >= 1 && rounds <= proposals && proposals >= f && proposals <= f * e, "rounds and proposals");
    for (int64_t i = 0; i < f; i++) count[greedy[i]]++;
    for (int64_t j = 0; j < e; j++) expect(c, count[j] == (capacity ? capacity[j] : f / e + (j < f % e)), "exact capacities");
    expect(c, !dotmoe_assignment_gap(f, e, scores, greedy, &gap) && gap >= 0.0, "gap >= 0");
    if (e == 1) expect_close(c, gap, 0.0, 0.0, "one expert leaves no gap");
}

static void check_rounding(checker *c) {
    double scores[64 * 9];
    int64_t capacity[9];
    for (int trial = 0; trial < 200; trial++) {
        const int64_t f = 1 + (int64_t)(uniform(c) * 60.0), e = 1 + (int64_t)(uniform(c) * 9.0);
        const double levels = trial % 3 == 0 ? 1e6 : trial % 3 == 1 ? 3.0 : 0.5; /* none, many, only ties */
        int64_t left = f;
        for (int64_t j = 0; j < f * e; j++) scores[j] = floor(uniform(c) * levels);
        for (int64_t j = 0; j < e; j++) {
            capacity[j] = j == e - 1 ? left : (int64_t)(uniform(c) * 1.5 * (double)left); /* often 0, never in balance */
            capacity[j] = capacity[j] > left ? left : capacity[j];
            left -= capacity[j];
        }
        check_assignment(c, f, e, scores, trial % 2 ? capacity : NULL);
    }
    end_group(c, "rounding");
}

static void check_permutation(checker *c) {
    enum { f = 12, e = 4, h = 5 };
    const int64_t expert_of[f] = {3, 0, 2, 1, 1, 3, 0, 2, 2, 3, 0, 1};
    int64_t order[f], inverse[f];
    double gate[f * h], up[f * h], down[f * h], both[2 * f * h], blocks[f * h], back[3][f * h];
    expect(c, !dotmoe_neuron_order(f, e, expert_of, order) && !dotmoe_inverse_order(f, order, inverse), "order runs");
    for (int n = 0; n < f; n++) {
        expect(c, inverse[order[n]] == n && order[inverse[n]] == n, "order o inverse = identity");
        expect(c, expert_of[order[n]] == n / (f / e), "sorted by expert");
        expect(c, n % (f / e) == 0 || order[n] > order[n - 1], "stable within an expert");
    }
    fill(c, gate, f * h, 1.0), fill(c, up, f * h, 1.0), fill(c, down, f * h, 1.0);
    expect(c, !dotmoe_expert_blocks(f, e, h, order, gate, up, down, both, blocks), "blocks run");
    expect(c, !dotmoe_dense_weights(f, e, h, order, both, blocks, back[0], back[1], back[2]), "dense weights run");
    expect(c, !memcmp(back[0], gate, sizeof gate) && !memcmp(back[1], up, sizeof up) && !memcmp(back[2], down, sizeof down),
           "blocks and back = identity, to the bit");
    end_group(c, "permutation");
}

/* ---- routing and soft_topk ---- */

enum { TOKENS = 5, EXPERTS = 6, K = 3, SLOTS = TOKENS * K };

typedef struct {
    double logits[TOKENS * EXPERTS], dweights[SLOTS], dprobs[TOKENS * EXPERTS], dbalance, dz;
    int mode;
} router;

static const uint8_t *padding(void) { /* token 1 */
    static const uint8_t mask[TOKENS] = {1, 0, 1, 1, 1};
    return mask;
}

static double router_loss(const void *problem) {
    const router *p = problem;
    int64_t indices[SLOTS];
    double weights[SLOTS], probs[TOKENS * EXPERTS], load[EXPERTS], balance, z;
    if (dotmoe_route_top_k(TOKENS, EXPERTS, K, p->logits, padding(), p->mode, indices, weights, probs, load, &balance, &z)) {
        return NAN;
    }
    return dot(weights, p->dweights, SLOTS) + dot(probs, p->dprobs, TOKENS * EXPERTS) + p->dbalance * balance + p->dz * z;
}

static void check_routing(checker *c) {
    router p = {.dbalance = 0.7, .dz = -0.3};
    int64_t indices[SLOTS];
    double weights[SLOTS], probs[TOKENS * EXPERTS], load[EXPERTS], balance, z, d[3][TOKENS * EXPERTS];
    fill(c, p.logits, TOKENS * EXPERTS, 2.0), fill(c, p.dweights, SLOTS, 1.0), fill(c, p.dprobs, TOKENS * EXPERTS, 1.0);
    for (p.mode = DOTMOE_UNIT; p.mode <= DOTMOE_RENORMALIZED; p.mode++) {
        double sum = 0.0;
        expect(c, !dotmoe_route_top_k(TOKENS, EXPERTS, K, p.logits, padding(), p.mode, indices, weights, probs, load, &balance,
                                      &z), "routing runs");
        for (int e = 0; e < EXPERTS; e++) sum += load[e];
        expect_close(c, sum, 1.0, 1e-15, "loads sum to 1");
        for (int j = 0; j < K; j++) expect(c, indices[K + j] == EXPERTS && weights[K + j] == 0.0, "padding has no slots");
        sum = weights[0] + weights[1] + weights[2];
        if (p.mode != DOTMOE_SOFTMAX) expect_close(c, sum, p.mode == DOTMOE_UNIT ? K : 1.0, 1e-15, "sum of the weights");
        expect(c, !dotmoe_route_top_k_backward(TOKENS, EXPERTS, K, p.logits, padding(), p.mode, indices, load, p.dweights,
                                               p.dprobs, p.dbalance, p.dz, d[p.mode]), "routing backward runs");
        if (p.mode == DOTMOE_UNIT) continue; /* flat: its gradient is straight-through */
        expect_gradient(c, router_loss, &p, p.logits, TOKENS * EXPERTS, d[p.mode], "d logits");
    }
    expect(c, !memcmp(d[DOTMOE_UNIT], d[DOTMOE_SOFTMAX], sizeof d[0]), "unit weights learn as softmax weights do");
    for (int j = 0; j < TOKENS * EXPERTS; j++) p.logits[j] = 0.5;
    dotmoe_route_top_k(TOKENS, EXPERTS, K, p.logits, NULL, DOTMOE_UNIT, indices, weights, probs, load, &balance, &z);
    for (int j = 0; j < SLOTS; j++) expect(c, indices[j] == j % K, "ties go to the lower index");
    expect_close(c, balance, 1.0, 1e-14, "the balance loss of even probabilities is 1");
    end_group(c, "routing");
}

typedef struct {
    double scores[EXPERTS], k, temperature, g[EXPERTS];
} soft;

static double soft_loss(const void *problem) {
    const soft *s = problem;
    double p[EXPERTS];
    return dotmoe_soft_top_k(1, EXPERTS, s->scores, &s->k, &s->temperature, p) ? NAN : dot(p, s->g, EXPERTS);
}

static void check_extreme(checker *c, int64_t n, const double *scores, double k, double temperature) {
    double p[EXPERTS], ds[EXPERTS], dk, dt, sum = 0.0;
    const double g[EXPERTS] = {1, -2, 3, -4, 5, -6};
    expect(c, !dotmoe_soft_top_k(1, n, scores, &k, &temperature, p), "soft top-k runs");
    expect(c, !dotmoe_soft_top_k_backward(1, n, scores, &k, &temperature, g, ds, &dk, &dt), "soft top-k backward runs");
    for (int64_t e = 0; e < n; e++) {
        sum += p[e];
        expect(c, p[e] >= 0.0 && p[e] <= 1.0 && isfinite(ds[e]), "0 <= p <= 1 and a finite gradient");
    }
    expect(c, isfinite(dk) && isfinite(dt), "finite gradients to k and temperature");
    expect(c, fabs(sum - k) <= 1e-14 * (double)n, "sum p = k");
}

static void check_soft_top_k(checker *c) {
    const double ks[] = {1e-300, 1e-9, 0.3, 1.0, 2.0, 2.5, 3.0, 4.7, 5.0, 6.0 - 1e-9};
    const double wide[3] = {-1e4, 0.0, 1e4}, ties[EXPERTS] = {2, 2, 2, 2, 2, 2}, huge[EXPERTS] = {-1e300, -1, 0, 0, 1, 1e300};
    double p[3], dk, dt, ds[3];
    for (int trial = 0; trial < 10; trial++) {
        soft s = {.k = 0.2 + 0.6 * trial, .temperature = trial % 2 ? 0.3 : 2.0};
        double d[EXPERTS];
        fill(c, s.scores, EXPERTS, 2.0), fill(c, s.g, EXPERTS, 1.0);
        dotmoe_soft_top_k_backward(1, EXPERTS, s.scores, &s.k, &s.temperature, s.g, d, &dk, &dt);
        expect_gradient(c, soft_loss, &s, s.scores, EXPERTS, d, "LapSum: d scores");
        expect_gradient(c, soft_loss, &s, &s.k, 1, &dk, "LapSum: d k");
        expect_gradient(c, soft_loss, &s, &s.temperature, 1, &dt, "LapSum: d temperature");
        for (int j = 0; j < 10; j++) {
            check_extreme(c, EXPERTS, s.scores, ks[j], trial % 3 ? 1.0 : 1e-6);
            check_extreme(c, EXPERTS, trial % 2 ? ties : huge, ks[j], 1.0);
        }
    }
    check_extreme(c, 1, wide, 0.5, 1.0), check_extreme(c, 3, wide, 1.0, 1.0), check_extreme(c, 3, wide, 1.5, 1e-3);
    /* b lies by the low end of the gap, then by the high end: measured from the other end it would lose digits. */
    check_extreme(c, 4, (double[]){0, 0, 0, 1e6}, 2.0, 1.0), check_extreme(c, 4, (double[]){-1e6, 0, 0, 0}, 2.0, 1.0);
    /* A whole k in a wide gap: b is the middle of the gap, so its two ends share dk; as one number b would be -inf. */
    dotmoe_soft_top_k(1, 3, wide, (double[]){1.0}, (double[]){1.0}, p);
    dotmoe_soft_top_k_backward(1, 3, wide, (double[]){1.0}, (double[]){1.0}, (double[]){4.0, 2.0, 1.0}, ds, &dk, &dt);
    expect(c, p[0] == 0.0 && p[1] == 0.0 && p[2] == 1.0, "a whole k in a wide gap: p");
    expect_close(c, dk, 1.5, 1e-12, "a whole k in a wide gap: d k");
    end_group(c, "soft_topk");
}

/* ---- dispatch and experts ---- */

enum { HIDDEN = 3, WIDTH = 2, NEURONS = 4 * WIDTH, BLOCKS = 4 };

typedef struct {
    double x[TOKENS * HIDDEN], gate_up[2 * NEURONS * HIDDEN], down[NEURONS * HIDDEN], weights[SLOTS], dy[TOKENS * HIDDEN];
    int64_t indices[SLOTS], expert_of[NEURONS];
    int activation, masked;
} layer;

static double layer_loss(const void *problem) {
    const layer *p = problem;
    const double *up = p->gate_up + NEURONS * HIDDEN;
    double y[TOKENS * HIDDEN];
    const int status = p->masked
        ? dotmoe_masked_ffn(TOKENS, HIDDEN, NEURONS, BLOCKS, K, p->x, p->gate_up, up, p->down, p->expert_of, p->indices,
                            p->weights, p->activation, y)
        : dotmoe_expert_ffn(TOKENS, HIDDEN, BLOCKS, WIDTH, K, p->x, p->gate_up, p->down, p->indices, p->weights, p->activation,
                            y);
    return status ? NAN : dot(y, p->dy, TOKENS * HIDDEN);
}

/* Expert 2 stays empty, token 3 has an empty slot, token 4 nothing but empty slots. */
static layer new_layer(checker *c) {
    const layer start = {.indices = {0, 1, 3, 3, 1, 0, 1, 0, 3, 0, BLOCKS, 1, BLOCKS, BLOCKS, BLOCKS},
                         .expert_of = {1, 0, 3, 1, 2, 0, 2, 3}};
    layer p = start;
    fill(c, p.x, TOKENS * HIDDEN, 2.0), fill(c, p.gate_up, 2 * NEURONS * HIDDEN, 1.0), fill(c, p.down, NEURONS * HIDDEN, 1.0);
    fill(c, p.weights, SLOTS, 1.0), fill(c, p.dy, TOKENS * HIDDEN, 1.0);
    return p;
}

static void check_dispatch(checker *c) {
    const layer p = new_layer(c);
    int64_t token[SLOTS], source[SLOTS], count[TOKENS] = {0};
    int32_t offsets[BLOCKS + 1];
    double xs[SLOTS * HIDDEN], rows[SLOTS * HIDDEN], y[TOKENS * HIDDEN], ones[SLOTS], dweights[SLOTS], drows[SLOTS * HIDDEN];
    for (int j = 0; j < SLOTS; j++) ones[j] = 1.0, count[j / K] += p.indices[j] < BLOCKS;
    expect(c, !dotmoe_dispatch_tokens(TOKENS, K, BLOCKS, p.indices, token, source, offsets), "dispatch runs");
    const int64_t used = offsets[BLOCKS];
    for (int s = 0; s < SLOTS; s++) {
        const int64_t e = p.indices[source[s]];
        expect(c, token[s] == source[s] / K, "token = source / K");
        expect(c, e == BLOCKS ? s >= used : s >= offsets[e] && s < offsets[e + 1], "a slot lies in its expert's range");
    }
    expect(c, !dotmoe_scatter_tokens(TOKENS, HIDDEN, SLOTS, used, token, p.x, xs), "scatter runs");
    for (int64_t j = used * HIDDEN; j < SLOTS * HIDDEN; j++) expect(c, xs[j] == 0.0, "rows of empty slots are zero");
    expect(c, !dotmoe_gather_tokens(TOKENS, HIDDEN, K, used, source, xs, ones, y), "gather runs");
    for (int j = 0; j < TOKENS * HIDDEN; j++) {
        expect_close(c, y[j], (double)count[j / HIDDEN] * p.x[j], 1e-15, "gather o scatter = number of slots");
    }
    fill(c, rows, SLOTS * HIDDEN, 1.0);
    dotmoe_scatter_tokens_backward(TOKENS, HIDDEN, SLOTS, used, token, rows, y);
    expect_close(c, dot(y, p.x, TOKENS * HIDDEN), dot(rows, xs, SLOTS * HIDDEN), 1e-14, "scatter's backward is its transpose");
    dotmoe_gather_tokens(TOKENS, HIDDEN, K, used, source, rows, p.weights, y);
    dotmoe_gather_tokens_backward(TOKENS, HIDDEN, K, used, source, rows, p.weights, p.dy, drows, dweights);
    expect_close(c, dot(drows, rows, SLOTS * HIDDEN), dot(y, p.dy, TOKENS * HIDDEN), 1e-14, "gather's backward, to the rows");
    expect_close(c, dot(dweights, p.weights, SLOTS), dot(y, p.dy, TOKENS * HIDDEN), 1e-14, "gather's backward, to the weights");
    end_group(c, "dispatch");
}

static void check_straight_through(checker *c, layer *p, const double *dassignment, const double *drouting) {
    double sum = 0.0;
    const double loss = layer_loss(p);
    for (int f = 0; f < NEURONS; f++) { /* y is linear in M: a moved neuron changes the loss by the difference of two entries */
        const int64_t kept = p->expert_of[f];
        sum += dassignment[f * BLOCKS + kept];
        for (int e = 0; e < BLOCKS; e++) {
            p->expert_of[f] = e;
            expect_close(c, dassignment[f * BLOCKS + e] - dassignment[f * BLOCKS + kept], layer_loss(p) - loss, 1e-13, "d M");
        }
        p->expert_of[f] = kept;
    }
    expect_close(c, sum, loss, 1e-13, "<M, d M> = loss");
    for (int t = 0; t < TOKENS; t++) { /* and linear in R: one more slot of weight 1, also at an expert that was not chosen */
        const int64_t index = p->indices[t * K];
        const double weight = p->weights[t * K];
        double values[BLOCKS + 1];
        for (int e = 0; e <= BLOCKS; e++) p->indices[t * K] = e, p->weights[t * K] = 1.0, values[e] = layer_loss(p);
        for (int e = 0; e < BLOCKS; e++) expect_close(c, drouting[t * BLOCKS + e], values[e] - values[BLOCKS], 1e-13, "d R");
        p->indices[t * K] = index, p->weights[t * K] = weight;
    }
}

static void check_layer(checker *c, int activation, int masked) {
    layer p = new_layer(c);
    double dx[TOKENS * HIDDEN], dgate_up[2 * NEURONS * HIDDEN], ddown[NEURONS * HIDDEN], dw[SLOTS];
    double dm[NEURONS * BLOCKS], dr[TOKENS * BLOCKS];
    double *up = p.gate_up + NEURONS * HIDDEN, *dup = dgate_up + NEURONS * HIDDEN;
    p.activation = activation, p.masked = masked;
    const int status = masked
        ? dotmoe_masked_ffn_backward(TOKENS, HIDDEN, NEURONS, BLOCKS, K, p.x, p.gate_up, up, p.down, p.expert_of, p.indices,
                                     p.weights, activation, p.dy, dx, dgate_up, dup, ddown, dm, dr, dw)
        : dotmoe_expert_ffn_backward(TOKENS, HIDDEN, BLOCKS, WIDTH, K, p.x, p.gate_up, p.down, p.indices, p.weights, activation,
                                     p.dy, dx, dgate_up, ddown, dw);
    expect(c, !status, "the FFN's backward runs");
    expect_gradient(c, layer_loss, &p, p.x, TOKENS * HIDDEN, dx, "d x");
    expect_gradient(c, layer_loss, &p, p.gate_up, 2 * NEURONS * HIDDEN, dgate_up, "d gate and up");
    expect_gradient(c, layer_loss, &p, p.down, NEURONS * HIDDEN, ddown, "d down");
    expect_gradient(c, layer_loss, &p, p.weights, SLOTS, dw, "d weights");
    if (masked) check_straight_through(c, &p, dm, dr);
}

/* The same layer three ways: masked, routed by blocks, and grouped_mm's own identity on its backward. */
static void check_paths(checker *c) {
    layer p = new_layer(c);
    int64_t order[NEURONS];
    const int32_t offsets[BLOCKS + 1] = {0, 4, 4, 9, 12};
    double both[2 * NEURONS * HIDDEN], blocks[NEURONS * HIDDEN], y[2][TOKENS * HIDDEN];
    double a[SLOTS * HIDDEN], b[BLOCKS * HIDDEN * WIDTH], dy[SLOTS * WIDTH], r[SLOTS * WIDTH], da[SLOTS * HIDDEN];
    double db[BLOCKS * HIDDEN * WIDTH];
    dotmoe_neuron_order(NEURONS, BLOCKS, p.expert_of, order);
    dotmoe_expert_blocks(NEURONS, BLOCKS, HIDDEN, order, p.gate_up, p.gate_up + NEURONS * HIDDEN, p.down, both, blocks);
    dotmoe_masked_ffn(TOKENS, HIDDEN, NEURONS, BLOCKS, K, p.x, p.gate_up, p.gate_up + NEURONS * HIDDEN, p.down, p.expert_of,
                      p.indices, p.weights, DOTMOE_SILU, y[0]);
    dotmoe_expert_ffn(TOKENS, HIDDEN, BLOCKS, WIDTH, K, p.x, both, blocks, p.indices, p.weights, DOTMOE_SILU, y[1]);
    for (int j = 0; j < TOKENS * HIDDEN; j++) expect_close(c, y[1][j], y[0][j], 1e-14, "routed blocks = masked dense FFN");
    fill(c, a, SLOTS * HIDDEN, 1.0), fill(c, b, BLOCKS * HIDDEN * WIDTH, 1.0), fill(c, dy, SLOTS * WIDTH, 1.0);
    dotmoe_grouped_mm(SLOTS, HIDDEN, WIDTH, BLOCKS, a, b, HIDDEN * WIDTH, WIDTH, 1, offsets, r);
    dotmoe_grouped_mm_backward(SLOTS, HIDDEN, WIDTH, BLOCKS, a, b, HIDDEN * WIDTH, WIDTH, 1, offsets, dy, da, db);
    expect_close(c, dot(a, da, SLOTS * HIDDEN), dot(r, dy, SLOTS * WIDTH), 1e-14, "<a, da> = <y, dy>");
    expect_close(c, dot(b, db, BLOCKS * HIDDEN * WIDTH), dot(r, dy, SLOTS * WIDTH), 1e-14, "<b, db> = <y, dy>");
    for (int j = 12 * WIDTH; j < SLOTS * WIDTH; j++) expect(c, r[j] == 0.0, "rows beyond the last are zero");
    for (int j = 0; j < HIDDEN * WIDTH; j++) expect(c, db[HIDDEN * WIDTH + j] == 0.0, "an empty expert has gradient 0");
}

static void check_experts(checker *c) {
    for (int activation = DOTMOE_SILU; activation <= DOTMOE_GELU_TANH; activation++) {
        check_layer(c, activation, 0);
        check_layer(c, activation, 1);
    }
    check_paths(c);
    end_group(c, "experts");
}

/* ---- bad arguments ---- */

static void check_errors(checker *c) {
    double a[4] = {1, 2, 3, 4}, bad[4] = {1, 2, NAN, 4}, out[4], u[2], v[2], error, k = 1.0, one = 1.0;
    int64_t n[4], high[4] = {0, 1, 2, 9}, t;
    int32_t offsets[3] = {0, 1, 2}, falling[3] = {0, 2, 1};
    const int64_t huge = INT64_C(1) << 32; /* its square wraps to 0 */
    expect(c, dotmoe_sinkhorn(2, 2, bad, NULL, 1, 5, 0, NULL, 0, out, u, v, &t, &error, NULL) == DOTMOE_BAD_VALUE, "NaN");
    expect(c, dotmoe_sinkhorn(2, 2, a, NULL, 0, 5, 0, NULL, 0, out, u, v, &t, &error, NULL) == DOTMOE_BAD_SCALAR, "tau 0");
    expect(c, dotmoe_sinkhorn(huge, huge, a, NULL, 1, 5, 0, NULL, 0, out, u, v, &t, &error, NULL) == DOTMOE_BAD_SIZE, "huge");
    expect(c, dotmoe_sinkhorn(2, 2, a, NULL, 1, 5, 0, NULL, 0, NULL, u, v, &t, &error, NULL) == DOTMOE_NULL, "no plan");
    expect(c, dotmoe_sinkhorn_implicit_backward(2, 2, a, 1, 0, (double[]){1, 0, 0, 1}, a, out, NULL, NULL) == DOTMOE_SINGULAR,
           "a hard plan without a ridge");
    expect(c, dotmoe_greedy_assignment(2, 2, a, (int64_t[]){1, 2}, n) == DOTMOE_BAD_VALUE, "capacities beyond F");
    expect(c, dotmoe_proposal_assignment(2, 2, bad, NULL, n, NULL, NULL) == DOTMOE_BAD_VALUE, "NaN scores");
    expect(c, dotmoe_inverse_order(2, (int64_t[]){1, 1}, n) == DOTMOE_BAD_VALUE, "not a permutation");
    expect(c, dotmoe_route_top_k(1, 4, 5, a, NULL, 0, n, out, out, out, &error, &one) == DOTMOE_BAD_SCALAR, "K > E");
    expect(c, dotmoe_soft_top_k(1, 1, a, &k, &one, out) == DOTMOE_BAD_VALUE, "k = E");
    expect(c, dotmoe_dispatch_tokens(2, 2, 3, high, n, n, offsets) == DOTMOE_BAD_VALUE, "an index beyond E");
    expect(c, dotmoe_dispatch_tokens(huge, 2, 3, high, n, n, offsets) == DOTMOE_BAD_SIZE, "more slots than int32 offsets");
    expect(c, dotmoe_grouped_mm(2, 1, 1, 2, a, a, 1, 1, 1, falling, out) == DOTMOE_BAD_VALUE, "falling offsets");
    expect(c, dotmoe_activate(7, 4, a, out, NULL) == DOTMOE_BAD_SCALAR, "an unknown activation");
    end_group(c, "errors");
}

int main(void) {
    checker c = {.state = UINT64_C(88172645463325252)};
    check_transport(&c);
    check_rounding(&c);
    check_permutation(&c);
    check_routing(&c);
    check_soft_top_k(&c);
    check_dispatch(&c);
    check_experts(&c);
    check_errors(&c);
    printf("%d passed, %d failed\n", c.passed, c.failed);
    return c.failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
