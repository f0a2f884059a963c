/* Transport: affinity A [F, E] -> plan P [F, E], and its two gradients. Symbols: X = A / tau, f = log u [F], g = log v [E].
 *
 * Everything stays in logarithms: u and v alone span more than a double's range once tau is small, while every exponential
 * below is of a number <= 0 (an entry minus the maximum it is normalised by) or of a log-probability.
 * Cost: 2 F E exponentials a step forward, 3 F E backward. The implicit gradient: F E^2 / 2 products and an [E, E] Cholesky. */
#include <float.h>

#include "checks.h"

/* The larger one; NaN where either is, unlike fmax, so that a plan that overflowed reports it. */
static double larger(double a, double b) { return isnan(a) || b <= a ? a : b; }

/* LSE_e(X_ie + g_e) of one row. */
static double row_log_sum(int64_t E, const double *row, double tau, const double *g) {
    double top = -INFINITY, sum = 0.0;
    for (int64_t e = 0; e < E; e++) top = fmax(top, row[e] / tau + g[e]);
    for (int64_t e = 0; e < E; e++) sum += exp(row[e] / tau + g[e] - top);
    return top + log(sum);
}

/* f_i = -LSE_e(X_ie + g_e) */
static void update_rows(int64_t F, int64_t E, const double *affinity, double tau, const double *g, double *f) {
    for (int64_t i = 0; i < F; i++) f[i] = -row_log_sum(E, affinity + i * E, tau, g);
}

/* log_sum_e = LSE_i(X_ie + f_i), with a maximum a column: from an arbitrary start a column may lie far below its rows. */
static void column_log_sums(int64_t F, int64_t E, const double *affinity, double tau, const double *f, double *top,
                            double *log_sum) {
    for (int64_t e = 0; e < E; e++) top[e] = -INFINITY, log_sum[e] = 0.0;
    for (int64_t i = 0; i < F; i++) {
        for (int64_t e = 0; e < E; e++) top[e] = fmax(top[e], affinity[i * E + e] / tau + f[i]);
    }
    for (int64_t i = 0; i < F; i++) {
        for (int64_t e = 0; e < E; e++) log_sum[e] += exp(affinity[i * E + e] / tau + f[i] - top[e]);
    }
    for (int64_t e = 0; e < E; e++) log_sum[e] = top[e] + log(log_sum[e]);
}

static int check_transport(int64_t F, int64_t E, const double *affinity, const double *capacity, double tau, int final) {
    const int64_t n = count_of(F, E);
    double total = 0.0;
    if (F < 1 || E < 1 || n < 0) return DOTMOE_BAD_SIZE;
    if (affinity == NULL) return DOTMOE_NULL;
    if (!(tau > 0.0) || !isfinite(tau) || (final != DOTMOE_FINAL_ROW && final != DOTMOE_FINAL_COLUMN)) return DOTMOE_BAD_SCALAR;
    for (int64_t j = 0; j < n; j++) {
        if (!isfinite(affinity[j] / tau)) return DOTMOE_BAD_VALUE; /* a tiny tau overflows too */
    }
    if (capacity == NULL) return DOTMOE_OK;
    for (int64_t e = 0; e < E; e++) {
        if (!(capacity[e] > 0.0)) return DOTMOE_BAD_VALUE; /* log 0; such an expert is simply left out */
        total += capacity[e];
    }
    return fabs(total - (double)F) <= 1e-4 * (double)F ? DOTMOE_OK : DOTMOE_BAD_VALUE;
}

static double capacity_of(int64_t F, int64_t E, const double *capacity, int64_t e) {
    return capacity != NULL ? capacity[e] : (double)F / (double)E;
}

/* The larger relative error of the marginal that the last update did not make exact. */
static double marginal_error(int64_t F, int64_t E, const double *plan, const double *capacity, int final) {
    const int by_row = final == DOTMOE_FINAL_COLUMN;
    const int64_t sums = by_row ? F : E, terms = by_row ? E : F;
    double worst = 0.0;
    for (int64_t a = 0; a < sums; a++) {
        double sum = 0.0;
        for (int64_t b = 0; b < terms; b++) sum += by_row ? plan[a * E + b] : plan[b * E + a];
        worst = larger(worst, fabs(sum / (by_row ? 1.0 : capacity_of(F, E, capacity, a)) - 1.0));
    }
    return worst;
}

int dotmoe_sinkhorn(int64_t F, int64_t E, const double *affinity, const double *capacity, double tau, int64_t num_iters,
                    double tol, const double *init, int final, double *plan, double *log_u, double *log_v, int64_t *taken,
                    double *error, double *history) {
    const int status = check_transport(F, E, affinity, capacity, tau, final);
    if (status != DOTMOE_OK) return status;
    if (num_iters < 0 || !(tol >= 0.0)) return DOTMOE_BAD_SCALAR;
    if (num_iters == INT64_MAX || (history != NULL && count_of(num_iters + 1, E) < 0)) return DOTMOE_BAD_SIZE;
    if (!plan || !log_u || !log_v || !taken || !error) return DOTMOE_NULL;
    if (init != NULL && !all_finite(init, E)) return DOTMOE_BAD_VALUE;
    double *top = new_doubles(E), *log_sum = new_doubles(E);
    if (!top || !log_sum) {
        free(top), free(log_sum);
        return DOTMOE_NO_MEMORY;
    }
    double *const f = log_u, *const g = log_v;
    for (int64_t e = 0; e < E; e++) g[e] = init != NULL ? init[e] : 0.0;
    for (int64_t e = 0; e < E && history != NULL; e++) history[e] = g[e];
    if (num_iters == 0) update_rows(F, E, affinity, tau, g, f);
    int64_t t = 0;
    for (int active = 1; active && t < num_iters;) {
        double worst = 0.0; /* of the column sums e^{g + log_sum} before they are corrected */
        update_rows(F, E, affinity, tau, g, f);
        column_log_sums(F, E, affinity, tau, f, top, log_sum);
        for (int64_t e = 0; e < E; e++) {
            const double log_c = log(capacity_of(F, E, capacity, e));
            worst = larger(worst, fabs(expm1(g[e] + log_sum[e] - log_c)));
            g[e] = log_c - log_sum[e];
        }
        t++;
        for (int64_t e = 0; e < E && history != NULL; e++) history[t * E + e] = g[e];
        active = tol > 0.0 ? worst > tol : 1;
    }
    if (final == DOTMOE_FINAL_ROW) update_rows(F, E, affinity, tau, g, f);
    for (int64_t i = 0; i < F; i++) {
        for (int64_t e = 0; e < E; e++) plan[i * E + e] = exp(affinity[i * E + e] / tau + f[i] + g[e]);
    }
    *taken = t;
    *error = marginal_error(F, E, plan, capacity, final);
    free(top), free(log_sum);
    return DOTMOE_OK;
}

/* The plan's own derivative: dX, and what reaches g_T (gbar [E]) and, where f was not recomputed, f_T (fbar [F]). */
static void start_backward(int64_t F, int64_t E, const double *affinity, double tau, const double *g, const double *f,
                           int fresh_rows, const double *dplan, double *dx, double *gbar, double *fbar) {
    set_zero(gbar, E);
    for (int64_t i = 0; i < F; i++) {
        double sum = 0.0; /* sum_e P * G */
        for (int64_t e = 0; e < E; e++) {
            dx[i * E + e] = exp(affinity[i * E + e] / tau + f[i] + g[e]) * dplan[i * E + e];
            sum += dx[i * E + e];
        }
        for (int64_t e = 0; e < E; e++) {
            if (fresh_rows) dx[i * E + e] -= exp(affinity[i * E + e] / tau + f[i] + g[e]) * sum; /* f = -LSE(X + g_T) */
            gbar[e] += dx[i * E + e];
        }
        fbar[i] = fresh_rows ? 0.0 : sum;
    }
}

/* One step: (g_{t-1} -> f_t -> g_t) backwards. In: gbar = dL/dg_t, fbar = what reached f_t besides. Out: gbar = dL/dg_{t-1}.
 * S_t = softmax_e(X + g_{t-1}) and Q_t = softmax_i(X + f_t) = exp(X + f_t + g_t) / c are the two Jacobians. */
static void step_backward(int64_t F, int64_t E, const double *affinity, const double *capacity, double tau,
                          const double *before, const double *after, const double *f, double *dx, double *gbar, double *fbar,
                          double *next) {
    set_zero(next, E);
    for (int64_t i = 0; i < F; i++) {
        for (int64_t e = 0; e < E; e++) {
            const double entry = exp(affinity[i * E + e] / tau + f[i] + after[e]); /* <= c_e: the columns are exact */
            const double pull = entry / capacity_of(F, E, capacity, e) * gbar[e];  /* Q_t * gbar */
            fbar[i] -= pull;
            dx[i * E + e] -= pull;
        }
        for (int64_t e = 0; e < E; e++) {
            const double pull = exp(affinity[i * E + e] / tau + f[i] + before[e]) * fbar[i]; /* S_t * fbar */
            dx[i * E + e] -= pull;
            next[e] -= pull;
        }
        fbar[i] = 0.0;
    }
    for (int64_t e = 0; e < E; e++) gbar[e] = next[e];
}

/* dA = dX / tau in place;  dtau = -<A, dA> / tau */
static void finish_backward(int64_t n, const double *affinity, double tau, double *dx, double *dtau) {
    double sum = 0.0;
    for (int64_t j = 0; j < n; j++) {
        dx[j] /= tau;
        sum += affinity[j] * dx[j];
    }
    if (dtau != NULL) *dtau = -sum / tau;
}

int dotmoe_sinkhorn_backward(int64_t F, int64_t E, const double *affinity, const double *capacity, double tau, int64_t taken,
                             const double *history, int final, const double *dplan, double *daffinity, double *dtau,
                             double *dcapacity, double *dinit) {
    const int status = check_transport(F, E, affinity, capacity, tau, final);
    if (status != DOTMOE_OK) return status;
    if (taken < 0 || taken == INT64_MAX || count_of(taken + 1, E) < 0) return DOTMOE_BAD_SIZE;
    if (!history || !dplan || !daffinity) return DOTMOE_NULL;
    if (!all_finite(history, (taken + 1) * E) || !all_finite(dplan, F * E)) return DOTMOE_BAD_VALUE;
    double *f = new_doubles(F), *fbar = new_doubles(F), *gbar = new_doubles(E), *next = new_doubles(E);
    if (!f || !fbar || !gbar || !next) {
        free(f), free(fbar), free(gbar), free(next);
        return DOTMOE_NO_MEMORY;
    }
    const int fresh_rows = final == DOTMOE_FINAL_ROW || taken == 0; /* f belongs to g_T, else to g_{T-1} */
    const double *last = history + taken * E;
    update_rows(F, E, affinity, tau, fresh_rows ? last : last - E, f);
    start_backward(F, E, affinity, tau, last, f, fresh_rows, dplan, daffinity, gbar, fbar);
    if (dcapacity != NULL) set_zero(dcapacity, E);
    for (int64_t t = taken; t >= 1; t--) {
        const double *before = history + (t - 1) * E;
        for (int64_t e = 0; e < E && dcapacity != NULL; e++) dcapacity[e] += gbar[e] / capacity_of(F, E, capacity, e);
        update_rows(F, E, affinity, tau, before, f);
        step_backward(F, E, affinity, capacity, tau, before, before + E, f, daffinity, gbar, fbar, next);
    }
    for (int64_t e = 0; e < E && dinit != NULL; e++) dinit[e] = gbar[e];
    finish_backward(F * E, affinity, tau, daffinity, dtau);
    free(f), free(fbar), free(gbar), free(next);
    return DOTMOE_OK;
}

/* matrix [E, E] := Laplacian of P^T diag(1/r) P + q q^T / sum(q) + ridge mean(q). Off-diagonal weights are summed twice, into
 * the entry and into the diagonals, so no difference of near-equal numbers is ever taken. */
static void build_laplacian(int64_t F, int64_t E, const double *plan, const double *r, const double *q, double ridge,
                            double *matrix) {
    double total = 0.0;
    set_zero(matrix, E * E);
    for (int64_t i = 0; i < F; i++) {
        const double *row = plan + i * E;
        for (int64_t e = 1; e < E; e++) {
            for (int64_t d = 0; d < e; d++) {
                const double weight = row[e] * row[d] / r[i];
                matrix[e * E + d] -= weight; /* lower triangle only */
                matrix[e * E + e] += weight;
                matrix[d * E + d] += weight;
            }
        }
    }
    for (int64_t e = 0; e < E; e++) total += q[e];
    for (int64_t e = 0; e < E; e++) {
        for (int64_t d = 0; d <= e; d++) matrix[e * E + d] += q[e] * q[d] / total;
        matrix[e * E + e] += ridge * total / (double)E;
    }
}

/* Solves the symmetric positive definite matrix y = y in place, by Cholesky on the lower triangle. */
static int solve_cholesky(int64_t E, double *matrix, double *y) {
    for (int64_t e = 0; e < E; e++) {
        const double whole = matrix[e * E + e];
        for (int64_t d = 0; d <= e; d++) {
            double sum = matrix[e * E + d];
            for (int64_t k = 0; k < d; k++) sum -= matrix[e * E + k] * matrix[d * E + k];
            if (d < e) matrix[e * E + d] = sum / matrix[d * E + d];
            else if (!(sum > (double)E * DBL_EPSILON * whole)) return DOTMOE_SINGULAR; /* only rounding is left */
            else matrix[e * E + e] = sqrt(sum);
        }
    }
    for (int64_t e = 0; e < E; e++) { /* L z = y */
        for (int64_t d = 0; d < e; d++) y[e] -= matrix[e * E + d] * y[d];
        y[e] /= matrix[e * E + e];
    }
    for (int64_t e = E - 1; e >= 0; e--) { /* L^T y = z */
        for (int64_t d = e + 1; d < E; d++) y[e] -= matrix[d * E + e] * y[d];
        y[e] /= matrix[e * E + e];
    }
    return DOTMOE_OK;
}

/* r = P 1, a = sum_e P * G (both [F]); q = P^T 1, y = sum_i P * G - P^T (a / r) (both [E]). */
static void marginals_and_sides(int64_t F, int64_t E, const double *plan, const double *dplan, double *r, double *a, double *q,
                                double *y) {
    set_zero(r, F), set_zero(a, F), set_zero(q, E), set_zero(y, E);
    for (int64_t i = 0; i < F; i++) {
        for (int64_t e = 0; e < E; e++) {
            r[i] += plan[i * E + e];
            a[i] += plan[i * E + e] * dplan[i * E + e];
            q[e] += plan[i * E + e];
        }
        for (int64_t e = 0; e < E; e++) y[e] += plan[i * E + e] * (dplan[i * E + e] - a[i] / r[i]);
    }
}

int dotmoe_sinkhorn_implicit_backward(int64_t F, int64_t E, const double *affinity, double tau, double ridge,
                                      const double *plan, const double *dplan, double *daffinity, double *dtau,
                                      double *dcapacity) {
    int status = check_transport(F, E, affinity, NULL, tau, DOTMOE_FINAL_ROW);
    if (status != DOTMOE_OK) return status;
    if (count_of(E, E) < 0) return DOTMOE_BAD_SIZE;
    if (!(ridge >= 0.0) || !isfinite(ridge)) return DOTMOE_BAD_SCALAR;
    if (!plan || !dplan || !daffinity) return DOTMOE_NULL;
    if (!all_finite(plan, F * E) || !all_finite(dplan, F * E)) return DOTMOE_BAD_VALUE;
    for (int64_t i = 0; i < F; i++) {
        double sum = 0.0, low = 0.0;
        for (int64_t e = 0; e < E; e++) sum += plan[i * E + e], low = fmin(low, plan[i * E + e]);
        if (low < 0.0 || !(sum > 0.0)) return DOTMOE_BAD_VALUE;
    }
    double *r = new_doubles(F), *a = new_doubles(F), *q = new_doubles(E), *y = new_doubles(E), *matrix = new_doubles(E * E);
    status = r && a && q && y && matrix ? DOTMOE_OK : DOTMOE_NO_MEMORY;
    if (status == DOTMOE_OK) {
        marginals_and_sides(F, E, plan, dplan, r, a, q, y);
        build_laplacian(F, E, plan, r, q, ridge, matrix);
        status = solve_cholesky(E, matrix, y);
    }
    for (int64_t i = 0; i < F && status == DOTMOE_OK; i++) {
        double x = a[i]; /* x_i = (a_i - sum_e P_ie y_e) / r_i */
        for (int64_t e = 0; e < E; e++) x -= plan[i * E + e] * y[e];
        x /= r[i];
        for (int64_t e = 0; e < E; e++) daffinity[i * E + e] = plan[i * E + e] * (dplan[i * E + e] - x - y[e]); /* dX */
    }
    if (status == DOTMOE_OK) {
        for (int64_t e = 0; e < E && dcapacity != NULL; e++) dcapacity[e] = y[e];
        finish_backward(F * E, affinity, tau, daffinity, dtau);
    }
    free(r), free(a), free(q), free(y), free(matrix);
    return status;
}
