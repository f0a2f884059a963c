/* Experts: the grouped matrix product, the routed FFN made from it, and the masked dense FFN of the alignment (eq. 4).
 *
 * Naive loops on purpose: an inner sum is one equation. T tokens, H hidden, s expert width, F = E s neurons, S = T K slots. */
#include "checks.h"

static double act(int activation, double x) {
    const double inner = 0.79788456080286535588 * (x + 0.044715 * x * x * x); /* sqrt(2 / pi) */
    if (activation == DOTMOE_SILU) return x / (1.0 + exp(-x));
    if (activation == DOTMOE_GELU) return 0.5 * x * erfc(-x * 0.70710678118654752440); /* erfc: 1 + erf cancels below -5 */
    return 0.5 * x * (1.0 + tanh(inner));
}

static double act_slope(int activation, double x) {
    if (activation == DOTMOE_SILU) {
        const double sigmoid = 1.0 / (1.0 + exp(-x));
        return sigmoid * (1.0 + x * (1.0 - sigmoid));
    }
    if (activation == DOTMOE_GELU) {
        return 0.5 * erfc(-x * 0.70710678118654752440) + x * 0.39894228040143267794 * exp(-0.5 * x * x); /* 1 / sqrt(2 pi) */
    }
    const double t = tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x));
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.79788456080286535588 * (1.0 + 3.0 * 0.044715 * x * x);
}

static int known(int activation) { return activation >= DOTMOE_SILU && activation <= DOTMOE_GELU_TANH; }

int dotmoe_activate(int activation, int64_t n, const double *x, double *y, double *dydx) {
    if (count_of(n, 1) < 0) return DOTMOE_BAD_SIZE;
    if (!known(activation)) return DOTMOE_BAD_SCALAR;
    if (missing(x, n)) return DOTMOE_NULL;
    for (int64_t i = 0; i < n && y != NULL; i++) y[i] = act(activation, x[i]);
    for (int64_t i = 0; i < n && dydx != NULL; i++) dydx[i] = act_slope(activation, x[i]);
    return DOTMOE_OK;
}

/* The array that b_e is read from: element (d, n) of expert e at array[e * e_step + d * d_step + n * n_step]. */
typedef struct {
    int64_t e, d, n;
} strides;

static int check_grouped(int64_t S, int64_t D, int64_t N, int64_t E, const double *a, const double *b, strides step,
                         const int32_t *offsets) {
    if (count_of(S, D) < 0 || count_of(S, N) < 0 || count_of(D, N) < 0) return DOTMOE_BAD_SIZE;
    if (E < 1 || count_of(E, D * N) < 0 || count_of(E, step.e) < 0) return DOTMOE_BAD_SIZE;
    if (count_of(D, step.d) < 0 || count_of(N, step.n) < 0) return DOTMOE_BAD_SIZE;
    if (missing(a, S * D) || missing(b, D * N) || !offsets) return DOTMOE_NULL;
    for (int64_t e = 0; e < E; e++) {
        if (offsets[e + 1] < offsets[e]) return DOTMOE_BAD_VALUE;
    }
    return offsets[0] == 0 && offsets[E] <= S ? DOTMOE_OK : DOTMOE_BAD_VALUE;
}

int dotmoe_grouped_mm(int64_t S, int64_t D, int64_t N, int64_t E, const double *a, const double *b, int64_t stride_e,
                      int64_t stride_d, int64_t stride_n, const int32_t *offsets, double *y) {
    const int status = check_grouped(S, D, N, E, a, b, (strides){stride_e, stride_d, stride_n}, offsets);
    if (status != DOTMOE_OK) return status;
    if (missing(y, S * N)) return DOTMOE_NULL;
    set_zero(y, S * N);
    for (int64_t e = 0; e < E; e++) {
        for (int64_t p = offsets[e]; p < offsets[e + 1]; p++) {
            for (int64_t n = 0; n < N; n++) {
                for (int64_t d = 0; d < D; d++) y[p * N + n] += a[p * D + d] * b[e * stride_e + d * stride_d + n * stride_n];
            }
        }
    }
    return DOTMOE_OK;
}

int dotmoe_grouped_mm_backward(int64_t S, int64_t D, int64_t N, int64_t E, const double *a, const double *b, int64_t stride_e,
                               int64_t stride_d, int64_t stride_n, const int32_t *offsets, const double *dy, double *da,
                               double *db) {
    const int status = check_grouped(S, D, N, E, a, b, (strides){stride_e, stride_d, stride_n}, offsets);
    if (status != DOTMOE_OK) return status;
    if (missing(dy, S * N)) return DOTMOE_NULL;
    if (da != NULL) set_zero(da, S * D);
    for (int64_t e = 0; e < E; e++) {
        for (int64_t d = 0; d < D; d++) {
            for (int64_t n = 0; n < N; n++) {
                const int64_t at = e * stride_e + d * stride_d + n * stride_n;
                double sum = 0.0; /* db = a^T dy over the rows of the expert */
                for (int64_t p = offsets[e]; p < offsets[e + 1]; p++) {
                    sum += a[p * D + d] * dy[p * N + n];
                    if (da != NULL) da[p * D + d] += dy[p * N + n] * b[at]; /* da = dy b^T */
                }
                if (db != NULL) db[at] = sum;
            }
        }
    }
    return DOTMOE_OK;
}

/* What the routed FFN computes on its way; the backward repeats the forward to have it. */
typedef struct {
    int64_t *token, *source; /* [S] */
    int32_t *offsets;        /* [E + 1] */
    double *xs, *ys;         /* [S, H] */
    double *both;            /* [S, 2s]: gate, then up */
    double *mixed;           /* [S, s]: act(gate) * up */
} routed;

static void free_routed(routed *r) {
    free(r->token), free(r->source), free(r->offsets), free(r->xs), free(r->ys), free(r->both), free(r->mixed);
}

static int check_expert_ffn(int64_t T, int64_t H, int64_t E, int64_t s, int64_t K, const double *x, const double *gate_up_proj,
                            const double *down_proj, const double *weights, int activation) {
    const int64_t S = count_of(T, K), block = count_of(s, 2) < 0 ? -1 : count_of(2 * s, H);
    if (S < 0 || E < 1 || block < 0 || count_of(T, H) < 0 || count_of(E, block) < 0) return DOTMOE_BAD_SIZE;
    if (count_of(S, H) < 0 || count_of(S, 2 * s) < 0 || count_of(E, 1) < 0) return DOTMOE_BAD_SIZE;
    if (!known(activation)) return DOTMOE_BAD_SCALAR;
    return missing(x, T * H) || missing(gate_up_proj, block) || missing(down_proj, block) || missing(weights, S) ? DOTMOE_NULL
                                                                                                             : DOTMOE_OK;
}

/* Fills r, which the caller frees whatever the status. */
static int routed_forward(int64_t T, int64_t H, int64_t E, int64_t s, int64_t K, const double *x, const double *gate_up_proj,
                          const double *down_proj, const int64_t *indices, int activation, routed *r) {
    const int64_t S = T * K;
    r->token = new_integers(S), r->source = new_integers(S), r->offsets = calloc((size_t)E + 1u, sizeof(int32_t));
    r->xs = new_doubles(S * H), r->ys = new_doubles(S * H), r->both = new_doubles(S * 2 * s), r->mixed = new_doubles(S * s);
    if (!r->token || !r->source || !r->offsets || !r->xs || !r->ys || !r->both || !r->mixed) return DOTMOE_NO_MEMORY;
    int status = dotmoe_dispatch_tokens(T, K, E, indices, r->token, r->source, r->offsets);
    if (status == DOTMOE_OK) status = dotmoe_scatter_tokens(T, H, S, r->offsets[E], r->token, x, r->xs);
    /* gate_up_proj [E, 2s, H] read as b [E, H, 2s], down_proj [E, H, s] as b [E, s, H]: transposed by their strides */
    if (status == DOTMOE_OK) {
        status = dotmoe_grouped_mm(S, H, 2 * s, E, r->xs, gate_up_proj, 2 * s * H, 1, H, r->offsets, r->both);
    }
    for (int64_t p = 0; p < S && status == DOTMOE_OK; p++) {
        const double *gate = r->both + p * 2 * s, *up = gate + s;
        for (int64_t m = 0; m < s; m++) r->mixed[p * s + m] = act(activation, gate[m]) * up[m];
    }
    return status == DOTMOE_OK ? dotmoe_grouped_mm(S, s, H, E, r->mixed, down_proj, H * s, 1, s, r->offsets, r->ys) : status;
}

int dotmoe_expert_ffn(int64_t T, int64_t H, int64_t E, int64_t s, int64_t K, const double *x, const double *gate_up_proj,
                      const double *down_proj, const int64_t *indices, const double *weights, int activation, double *y) {
    routed r = {0};
    int status = check_expert_ffn(T, H, E, s, K, x, gate_up_proj, down_proj, weights, activation);
    if (status == DOTMOE_OK && missing(y, T * H)) status = DOTMOE_NULL;
    if (status == DOTMOE_OK) status = routed_forward(T, H, E, s, K, x, gate_up_proj, down_proj, indices, activation, &r);
    if (status == DOTMOE_OK) status = dotmoe_gather_tokens(T, H, K, r.offsets[E], r.source, r.ys, weights, y);
    free_routed(&r);
    return status;
}

/* dmixed [S, s] -> dboth [S, 2s]: through act(gate) * up. */
static void mix_backward(int64_t S, int64_t s, int activation, const double *both, const double *dmixed, double *dboth) {
    for (int64_t p = 0; p < S; p++) {
        for (int64_t m = 0; m < s; m++) {
            const double gate = both[p * 2 * s + m], up = both[p * 2 * s + s + m], g = dmixed[p * s + m];
            dboth[p * 2 * s + m] = g * up * act_slope(activation, gate);
            dboth[p * 2 * s + s + m] = g * act(activation, gate);
        }
    }
}

int dotmoe_expert_ffn_backward(int64_t T, int64_t H, int64_t E, int64_t s, int64_t K, const double *x,
                               const double *gate_up_proj, const double *down_proj, const int64_t *indices,
                               const double *weights, int activation, const double *dy, double *dx, double *dgate_up_proj,
                               double *ddown_proj, double *dweights) {
    routed r = {0};
    int status = check_expert_ffn(T, H, E, s, K, x, gate_up_proj, down_proj, weights, activation);
    if (status == DOTMOE_OK && missing(dy, T * H)) status = DOTMOE_NULL;
    if (status != DOTMOE_OK) return status;
    const int64_t S = T * K;
    double *drows = new_doubles(S * H); /* dys, then dxs */
    double *dmixed = new_doubles(S * s), *dboth = new_doubles(S * 2 * s);
    status = drows && dmixed && dboth ? DOTMOE_OK : DOTMOE_NO_MEMORY;
    if (status == DOTMOE_OK) status = routed_forward(T, H, E, s, K, x, gate_up_proj, down_proj, indices, activation, &r);
    if (status == DOTMOE_OK) {
        status = dotmoe_gather_tokens_backward(T, H, K, r.offsets[E], r.source, r.ys, weights, dy, drows, dweights);
    }
    if (status == DOTMOE_OK) {
        status = dotmoe_grouped_mm_backward(S, s, H, E, r.mixed, down_proj, H * s, 1, s, r.offsets, drows, dmixed, ddown_proj);
    }
    if (status == DOTMOE_OK) {
        mix_backward(S, s, activation, r.both, dmixed, dboth);
        status = dotmoe_grouped_mm_backward(S, H, 2 * s, E, r.xs, gate_up_proj, 2 * s * H, 1, H, r.offsets, dboth, drows,
                                            dgate_up_proj);
    }
    if (status == DOTMOE_OK && dx != NULL) {
        status = dotmoe_scatter_tokens_backward(T, H, S, r.offsets[E], r.token, drows, dx);
    }
    free_routed(&r);
    free(drows), free(dmixed), free(dboth);
    return status;
}

/* ---- masked: every neuron is computed for every token, and weighted by the routing of its expert ---- */

static int check_masked(int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, const double *x, const double *gate_proj,
                        const double *up_proj, const double *down_proj, const int64_t *expert_of, const int64_t *indices,
                        int activation) {
    if (count_of(T, H) < 0 || count_of(F, H) < 0 || E < 1 || E == INT64_MAX || count_of(E + 1, 1) < 0) return DOTMOE_BAD_SIZE;
    if (count_of(T, K) < 0 || count_of(T, E) < 0 || count_of(F, E) < 0 || count_of(F, 1) < 0) return DOTMOE_BAD_SIZE;
    if (!known(activation)) return DOTMOE_BAD_SCALAR;
    if (missing(x, T * H) || missing(gate_proj, F * H) || missing(up_proj, F * H) || missing(down_proj, F * H) ||
        missing(expert_of, F) || missing(indices, T * K)) {
        return DOTMOE_NULL;
    }
    return all_within(expert_of, F, 0, E - 1) && all_within(indices, T * K, 0, E) ? DOTMOE_OK : DOTMOE_BAD_VALUE;
}

static double weight_of(const double *weights, int64_t pair) { return weights != NULL ? weights[pair] : 1.0; }

/* One token: its routing R_t [E + 1] (the last entry collects the empty slots), and x_t Wg^T, x_t Wu^T [F]. */
static void token_forward(int64_t t, int64_t H, int64_t F, int64_t E, int64_t K, const double *x, const double *gate_proj,
                          const double *up_proj, const int64_t *indices, const double *weights, double *routing, double *gate,
                          double *up) {
    set_zero(routing, E + 1), set_zero(gate, F), set_zero(up, F);
    for (int64_t j = 0; j < K; j++) routing[indices[t * K + j]] += weight_of(weights, t * K + j);
    for (int64_t f = 0; f < F; f++) {
        for (int64_t h = 0; h < H; h++) {
            gate[f] += x[t * H + h] * gate_proj[f * H + h];
            up[f] += x[t * H + h] * up_proj[f * H + h];
        }
    }
}

int dotmoe_masked_ffn(int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, const double *x, const double *gate_proj,
                      const double *up_proj, const double *down_proj, const int64_t *expert_of, const int64_t *indices,
                      const double *weights, int activation, double *y) {
    const int status = check_masked(T, H, F, E, K, x, gate_proj, up_proj, down_proj, expert_of, indices, activation);
    if (status != DOTMOE_OK) return status;
    if (missing(y, T * H)) return DOTMOE_NULL;
    double *routing = new_doubles(E + 1), *gate = new_doubles(F), *up = new_doubles(F);
    if (!routing || !gate || !up) {
        free(routing), free(gate), free(up);
        return DOTMOE_NO_MEMORY;
    }
    set_zero(y, T * H);
    for (int64_t t = 0; t < T; t++) {
        token_forward(t, H, F, E, K, x, gate_proj, up_proj, indices, weights, routing, gate, up);
        for (int64_t h = 0; h < H; h++) {
            for (int64_t f = 0; f < F; f++) {
                y[t * H + h] += act(activation, gate[f]) * up[f] * routing[expert_of[f]] * down_proj[h * F + f];
            }
        }
    }
    free(routing), free(gate), free(up);
    return DOTMOE_OK;
}

int dotmoe_masked_ffn_backward(int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, const double *x, const double *gate_proj,
                               const double *up_proj, const double *down_proj, const int64_t *expert_of, const int64_t *indices,
                               const double *weights, int activation, const double *dy, double *dx, double *dgate_proj,
                               double *dup_proj, double *ddown_proj, double *dassignment, double *drouting, double *dweights) {
    const int status = check_masked(T, H, F, E, K, x, gate_proj, up_proj, down_proj, expert_of, indices, activation);
    if (status != DOTMOE_OK) return status;
    if (missing(dy, T * H)) return DOTMOE_NULL;
    double *routing = new_doubles(E + 1), *drow = new_doubles(E + 1), *gate = new_doubles(F), *up = new_doubles(F);
    if (!routing || !drow || !gate || !up) {
        free(routing), free(drow), free(gate), free(up);
        return DOTMOE_NO_MEMORY;
    }
    if (dx) set_zero(dx, T * H);
    if (dgate_proj) set_zero(dgate_proj, F * H);
    if (dup_proj) set_zero(dup_proj, F * H);
    if (ddown_proj) set_zero(ddown_proj, H * F);
    if (dassignment) set_zero(dassignment, F * E);
    for (int64_t t = 0; t < T; t++) {
        token_forward(t, H, F, E, K, x, gate_proj, up_proj, indices, weights, routing, gate, up);
        set_zero(drow, E + 1);
        for (int64_t f = 0; f < F; f++) {
            const double a = act(activation, gate[f]), u = a * up[f], n = routing[expert_of[f]]; /* U_tf, N_tf */
            double v = 0.0;                                                                      /* (dy Wd)_tf */
            for (int64_t h = 0; h < H; h++) v += dy[t * H + h] * down_proj[h * F + f];
            drow[expert_of[f]] += u * v; /* D_tf = u v, for every expert: the router learns from those it did not choose */
            for (int64_t j = 0; j < K && dassignment; j++) {
                const int64_t e = indices[t * K + j];
                if (e < E) dassignment[f * E + e] += u * v * weight_of(weights, t * K + j);
            }
            const double dgate = v * n * up[f] * act_slope(activation, gate[f]), dup = v * n * a;
            for (int64_t h = 0; h < H; h++) {
                if (dx) dx[t * H + h] += dgate * gate_proj[f * H + h] + dup * up_proj[f * H + h];
                if (dgate_proj) dgate_proj[f * H + h] += dgate * x[t * H + h];
                if (dup_proj) dup_proj[f * H + h] += dup * x[t * H + h];
                if (ddown_proj) ddown_proj[h * F + f] += dy[t * H + h] * u * n;
            }
        }
        for (int64_t e = 0; e < E && drouting; e++) drouting[t * E + e] = drow[e];
        for (int64_t j = 0; j < K && dweights; j++) dweights[t * K + j] = drow[indices[t * K + j]]; /* [E] stays 0 */
    }
    free(routing), free(drow), free(gate), free(up);
    return DOTMOE_OK;
}
