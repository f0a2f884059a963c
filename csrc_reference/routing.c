/* Routing: router logits Z [T, E] -> the K experts a token visits, their weights, the load, two losses; and dL/dZ.
 *
 * Q = softmax(Z). The top-K mask R is binary, so its gradient is replaced by that of Q (straight-through): in UNIT mode a slot
 * weighs exactly 1 in the forward and like Q in the backward. Load counts slots and is a constant in the backward.
 * One token at a time, O(E) memory; selection by insertion, O(E K) a token: a port would sort or use a heap. */
#include "checks.h"

/* q = softmax(z) [E]; returns LSE(z). */
static double softmax(int64_t E, const double *z, double *q) {
    double top = -INFINITY, sum = 0.0;
    for (int64_t e = 0; e < E; e++) top = fmax(top, z[e]);
    for (int64_t e = 0; e < E; e++) sum += q[e] = exp(z[e] - top);
    for (int64_t e = 0; e < E; e++) q[e] /= sum;
    return top + log(sum);
}

/* chosen [K]: the K largest of z [E], best first. A later expert passes only strictly smaller ones: ties to the lower. */
static void select_largest(int64_t E, int64_t K, const double *z, int64_t *chosen) {
    int64_t count = 0;
    for (int64_t e = 0; e < E; e++) {
        int64_t at = count;
        while (at > 0 && z[e] > z[chosen[at - 1]]) at--;
        if (at == K) continue;
        if (count < K) count++;
        for (int64_t j = count - 1; j > at; j--) chosen[j] = chosen[j - 1];
        chosen[at] = e;
    }
}

static int is_valid(const uint8_t *mask, int64_t t) { return mask == NULL || mask[t] != 0; }

static int check_routing(int64_t T, int64_t E, int64_t K, const double *logits, int mode) {
    if (T < 0 || E < 1 || count_of(T, E) < 0 || count_of(E, 1) < 0) return DOTMOE_BAD_SIZE;
    if (missing(logits, T * E)) return DOTMOE_NULL;
    if (K < 1 || K > E || mode < DOTMOE_UNIT || mode > DOTMOE_RENORMALIZED) return DOTMOE_BAD_SCALAR;
    for (int64_t t = 0; t < T; t++) {
        double top = -INFINITY;
        for (int64_t e = 0; e < E; e++) {
            if (isnan(logits[t * E + e])) return DOTMOE_BAD_VALUE;
            top = fmax(top, logits[t * E + e]);
        }
        if (!isfinite(top)) return DOTMOE_BAD_VALUE;
    }
    return DOTMOE_OK;
}

static void choose_weights(int64_t K, int mode, const double *q, const int64_t *chosen, double *weights) {
    double sum = 0.0;
    for (int64_t j = 0; j < K; j++) sum += q[chosen[j]];
    for (int64_t j = 0; j < K; j++) {
        weights[j] = mode == DOTMOE_UNIT ? 1.0 : q[chosen[j]] / (mode == DOTMOE_RENORMALIZED ? sum : 1.0);
    }
}

int dotmoe_route_top_k(int64_t T, int64_t E, int64_t K, const double *logits, const uint8_t *mask, int mode, int64_t *indices,
                       double *weights, double *probs, double *load, double *balance_loss, double *z_loss) {
    const int status = check_routing(T, E, K, logits, mode);
    double tokens = 0.0, squares = 0.0, balance = 0.0;
    if (status != DOTMOE_OK) return status;
    if (missing(indices, T) || missing(weights, T) || missing(probs, T)) return DOTMOE_NULL;
    if (!load || !balance_loss || !z_loss) return DOTMOE_NULL;
    double *total = new_doubles(E); /* sum_t Q_te over the valid tokens */
    if (total == NULL) return DOTMOE_NO_MEMORY;
    set_zero(load, E);
    for (int64_t t = 0; t < T; t++) {
        int64_t *chosen = indices + t * K;
        double *q = probs + t * E, *w = weights + t * K;
        const double log_sum = softmax(E, logits + t * E, q);
        if (!is_valid(mask, t)) {
            for (int64_t j = 0; j < K; j++) chosen[j] = E, w[j] = 0.0;
            continue;
        }
        select_largest(E, K, logits + t * E, chosen);
        choose_weights(K, mode, q, chosen, w);
        for (int64_t j = 0; j < K; j++) load[chosen[j]] += 1.0;
        for (int64_t e = 0; e < E; e++) total[e] += q[e];
        squares += log_sum * log_sum;
        tokens += 1.0;
    }
    for (int64_t e = 0; e < E && tokens > 0.0; e++) {
        load[e] /= tokens * (double)K;
        balance += (double)E * load[e] * (total[e] / tokens);
    }
    *balance_loss = balance;
    *z_loss = tokens > 0.0 ? squares / tokens : 0.0;
    free(total);
    return DOTMOE_OK;
}

/* Adds to dq [E] what the weights' gradient dw [K] sends to Q. Renormalised w_j = q_j / sum q:
 * dq_j = (dw_j - sum_l w_l dw_l) / sum q. */
static void weights_backward(int64_t E, int64_t K, int mode, const double *q, const int64_t *chosen, const double *dw,
                             double *dq) {
    double sum = 0.0, mean = 0.0;
    for (int64_t j = 0; j < K && mode == DOTMOE_RENORMALIZED; j++) {
        if (chosen[j] == E) continue;
        sum += q[chosen[j]];
        mean += q[chosen[j]] * dw[j];
    }
    for (int64_t j = 0; j < K; j++) {
        if (chosen[j] == E) continue;
        dq[chosen[j]] += mode == DOTMOE_RENORMALIZED ? (dw[j] - mean / sum) / sum : dw[j];
    }
}

int dotmoe_route_top_k_backward(int64_t T, int64_t E, int64_t K, const double *logits, const uint8_t *mask, int mode,
                                const int64_t *indices, const double *load, const double *dweights, const double *dprobs,
                                double dbalance, double dz, double *dlogits) {
    const int status = check_routing(T, E, K, logits, mode);
    double tokens = 0.0;
    if (status != DOTMOE_OK) return status;
    if (missing(indices, T) || missing(dlogits, T) || !load) return DOTMOE_NULL;
    if (!all_within(indices, T * K, 0, E) || !all_finite(load, E)) return DOTMOE_BAD_VALUE;
    double *q = new_doubles(E), *dq = new_doubles(E);
    if (!q || !dq) {
        free(q), free(dq);
        return DOTMOE_NO_MEMORY;
    }
    for (int64_t t = 0; t < T; t++) tokens += is_valid(mask, t);
    for (int64_t t = 0; t < T; t++) {
        const double log_sum = softmax(E, logits + t * E, q);
        double mean = 0.0; /* <q, dq> */
        for (int64_t e = 0; e < E; e++) {
            dq[e] = dprobs != NULL ? dprobs[t * E + e] : 0.0;
            if (is_valid(mask, t)) dq[e] += dbalance * (double)E * load[e] / tokens;
        }
        if (dweights != NULL) weights_backward(E, K, mode, q, indices + t * K, dweights + t * K, dq);
        for (int64_t e = 0; e < E; e++) mean += q[e] * dq[e];
        for (int64_t e = 0; e < E; e++) {
            dlogits[t * E + e] = q[e] * (dq[e] - mean); /* dZ = Q * (dQ - <Q, dQ>) */
            if (is_valid(mask, t)) dlogits[t * E + e] += dz * 2.0 * log_sum / tokens * q[e];
        }
    }
    free(q), free(dq);
    return DOTMOE_OK;
}
