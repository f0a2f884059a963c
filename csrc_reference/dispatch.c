/* Dispatch: the S = T K routed pairs, sorted by expert into slots; tokens copied into slots and summed back.
 *
 * The sort counts: position of a pair = pairs of lower experts + earlier pairs of the same expert. So within an expert the
 * slots keep the order of the tokens, and the result does not depend on how a parallel port schedules its work. */
#include "checks.h"

int dotmoe_dispatch_tokens(int64_t T, int64_t K, int64_t E, const int64_t *indices, int64_t *token, int64_t *source,
                           int32_t *offsets) {
    const int64_t S = count_of(T, K);
    if (S < 0 || S > INT32_MAX || E < 1 || E == INT64_MAX || count_of(E + 1, 1) < 0) return DOTMOE_BAD_SIZE;
    if (missing(indices, S) || missing(token, S) || missing(source, S) || !offsets) return DOTMOE_NULL;
    if (!all_within(indices, S, 0, E)) return DOTMOE_BAD_VALUE;
    int64_t *next = new_integers(E + 1); /* next free slot of each expert; E is the bin of empty slots */
    if (next == NULL) return DOTMOE_NO_MEMORY;
    for (int64_t p = 0; p < S; p++) {
        if (indices[p] < E) next[indices[p] + 1]++;
    }
    for (int64_t e = 0; e < E; e++) next[e + 1] += next[e];
    for (int64_t e = 0; e <= E; e++) offsets[e] = (int32_t)next[e];
    for (int64_t pair = 0; pair < S; pair++) {
        const int64_t p = next[indices[pair]]++;
        source[p] = pair;
        token[p] = pair / K;
    }
    free(next);
    return DOTMOE_OK;
}

static int check_rows(int64_t T, int64_t H, int64_t S, int64_t used) {
    if (count_of(T, H) < 0 || count_of(S, H) < 0 || count_of(S, 1) < 0) return DOTMOE_BAD_SIZE;
    return used < 0 || used > S ? DOTMOE_BAD_SCALAR : DOTMOE_OK;
}

int dotmoe_scatter_tokens(int64_t T, int64_t H, int64_t S, int64_t used, const int64_t *token, const double *x, double *xs) {
    const int status = check_rows(T, H, S, used);
    if (status != DOTMOE_OK) return status;
    if (missing(token, S) || missing(x, T * H) || missing(xs, S * H)) return DOTMOE_NULL;
    if (!all_within(token, S, 0, T - 1)) return DOTMOE_BAD_VALUE;
    for (int64_t p = 0; p < S; p++) {
        for (int64_t h = 0; h < H; h++) xs[p * H + h] = p < used ? x[token[p] * H + h] : 0.0;
    }
    return DOTMOE_OK;
}

int dotmoe_scatter_tokens_backward(int64_t T, int64_t H, int64_t S, int64_t used, const int64_t *token, const double *dxs,
                                   double *dx) {
    const int status = check_rows(T, H, S, used);
    if (status != DOTMOE_OK) return status;
    if (missing(token, S) || missing(dxs, S * H) || missing(dx, T * H)) return DOTMOE_NULL;
    if (!all_within(token, S, 0, T - 1)) return DOTMOE_BAD_VALUE;
    set_zero(dx, T * H);
    for (int64_t p = 0; p < used; p++) {
        for (int64_t h = 0; h < H; h++) dx[token[p] * H + h] += dxs[p * H + h];
    }
    return DOTMOE_OK;
}

static int check_gather(int64_t T, int64_t H, int64_t K, int64_t used, const int64_t *source, const double *ys,
                        const double *weights) {
    const int64_t S = count_of(T, K);
    const int status = S < 0 ? DOTMOE_BAD_SIZE : check_rows(T, H, S, used);
    if (status != DOTMOE_OK) return status;
    if (missing(source, S) || missing(ys, S * H) || missing(weights, S)) return DOTMOE_NULL;
    return all_within(source, S, 0, S - 1) ? DOTMOE_OK : DOTMOE_BAD_VALUE;
}

int dotmoe_gather_tokens(int64_t T, int64_t H, int64_t K, int64_t used, const int64_t *source, const double *ys,
                         const double *weights, double *y) {
    const int status = check_gather(T, H, K, used, source, ys, weights);
    if (status != DOTMOE_OK) return status;
    if (missing(y, T * H)) return DOTMOE_NULL;
    set_zero(y, T * H);
    for (int64_t p = 0; p < used; p++) {
        const double w = weights[source[p]];
        for (int64_t h = 0; h < H; h++) y[source[p] / K * H + h] += w * ys[p * H + h];
    }
    return DOTMOE_OK;
}

int dotmoe_gather_tokens_backward(int64_t T, int64_t H, int64_t K, int64_t used, const int64_t *source, const double *ys,
                                  const double *weights, const double *dy, double *dys, double *dweights) {
    const int status = check_gather(T, H, K, used, source, ys, weights);
    if (status != DOTMOE_OK) return status;
    if (missing(dy, T * H)) return DOTMOE_NULL;
    if (dys != NULL) set_zero(dys, T * K * H);
    if (dweights != NULL) set_zero(dweights, T * K);
    for (int64_t p = 0; p < used; p++) {
        const double *g = dy + source[p] / K * H, *row = ys + p * H, w = weights[source[p]];
        for (int64_t h = 0; h < H; h++) {
            if (dys != NULL) dys[p * H + h] = w * g[h];
            if (dweights != NULL) dweights[source[p]] += row[h] * g[h];
        }
    }
    return DOTMOE_OK;
}
