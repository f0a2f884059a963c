/* LapSum soft top-k: p_i = Phi(z_i - b), z = r / alpha, with b such that sum p = k; Phi is the Laplace distribution function
 * Phi(x) = e^x / 2 for x <= 0, else 1 - e^-x / 2.
 *
 * Closed form. Sort z ascending into s_0 .. s_{n-1}. Between two neighbours the sum is a quadratic in y = e^{b - s_m}, with
 *     B_i = sum_{j<=i} e^{s_j - s_i},  C_i = sum_{j>=i} e^{s_i - s_j}   (two scans, every value in [1, n]).
 * b is kept as a score and the distance from it, never as one number and never as y: with an integer k inside a wide gap b lies
 * far from every score, y underflows, and yet p and its gradient are ordinary numbers. The score is the neighbour that b lies
 * nearer to: measured from the other one, b would carry a rounding error of the whole gap.
 * Cost a token: one sort, two scans, one square root. */
#include "checks.h"

typedef struct {
    double anchor; /* s_m or s_{m-1} */
    double beyond; /* b - anchor */
} threshold;

typedef struct {
    double *s, *b, *c; /* [E] each: sorted scores over temperature, B, C */
} workspace;

static int ascending(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* n - sum p at b = s_i: the value that must reach n - k. */
static double missed_at(const workspace *w, int64_t i) {
    return (double)i + 0.5 + (w->c[i] - 1.0) / 2.0 - (w->b[i] - 1.0) / 2.0;
}

/* b between `low` = s_{m-1} and `high` = s_m: C y^2 - 2 d y - B e^{-gap} = 0 with d = n - k - m, whose positive root
 * y = (d + q) / C = B e^{-gap} / (q - d) is taken in the form without cancellation. b = high + ln y, and for d < 0 the gap
 * drops out: b = low + ln B - ln(q - d). */
static threshold between(double low, double high, double d, double B, double C) {
    const double gap = high - low, q = sqrt(d * d + B * C * exp(-gap));
    if (d > 0.0) return (threshold){high, log((d + q) / C)};
    if (d < 0.0) return (threshold){low, log(B) - log(q - d)};
    return (threshold){low, (gap + log(B) - log(C)) / 2.0}; /* k whole: the middle, even where e^{-gap} underflows */
}

static threshold find_threshold(int64_t n, const double *scores, double k, double temperature, workspace *w) {
    for (int64_t i = 0; i < n; i++) w->s[i] = scores[i] / temperature;
    qsort(w->s, (size_t)n, sizeof *w->s, ascending);
    w->b[0] = w->c[n - 1] = 1.0;
    for (int64_t i = 1; i < n; i++) w->b[i] = 1.0 + w->b[i - 1] * exp(w->s[i - 1] - w->s[i]);
    for (int64_t i = n - 2; i >= 0; i--) w->c[i] = 1.0 + w->c[i + 1] * exp(w->s[i] - w->s[i + 1]);
    int64_t m = 0;
    while (m < n && missed_at(w, m) < (double)n - k) m++;
    if (m == 0) return (threshold){w->s[0], log(2.0 * ((double)n - k) / w->c[0])}; /* b at or below every score */
    if (m == n) return (threshold){w->s[n - 1], -log(2.0 * k / w->b[n - 1])};      /* b above: from k itself, exact if tiny */
    const double d = (double)(n - m) - k; /* this order: n - m is exact */
    return between(w->s[m - 1], w->s[m], d, w->b[m - 1], w->c[m]);
}

static double laplace(double x) { return x <= 0.0 ? 0.5 * exp(x) : 1.0 - 0.5 * exp(-x); }

static int check_soft_top_k(int64_t T, int64_t E, const double *scores, const double *k, const double *temperature) {
    if (T < 0 || E < 1 || count_of(T, E) < 0 || count_of(E, 1) < 0) return DOTMOE_BAD_SIZE;
    if (missing(scores, T) || missing(k, T) || missing(temperature, T)) return DOTMOE_NULL;
    for (int64_t t = 0; t < T; t++) {
        if (!(k[t] > 0.0) || !(k[t] < (double)E)) return DOTMOE_BAD_VALUE;
        if (!(temperature[t] > 0.0) || !isfinite(temperature[t])) return DOTMOE_BAD_VALUE;
        for (int64_t e = 0; e < E; e++) {
            if (!(fabs(scores[t * E + e] / temperature[t]) <= 1e300)) return DOTMOE_BAD_VALUE; /* differences stay finite */
        }
    }
    return DOTMOE_OK;
}

static int new_workspace(int64_t E, workspace *w) {
    w->s = new_doubles(E), w->b = new_doubles(E), w->c = new_doubles(E);
    return w->s && w->b && w->c ? DOTMOE_OK : DOTMOE_NO_MEMORY;
}

static void free_workspace(workspace *w) { free(w->s), free(w->b), free(w->c); }

int dotmoe_soft_top_k(int64_t T, int64_t E, const double *scores, const double *k, const double *temperature, double *p) {
    workspace w;
    int status = check_soft_top_k(T, E, scores, k, temperature);
    if (status != DOTMOE_OK) return status;
    if (missing(p, T)) return DOTMOE_NULL;
    status = new_workspace(E, &w);
    for (int64_t t = 0; t < T && status == DOTMOE_OK; t++) {
        const threshold b = find_threshold(E, scores + t * E, k[t], temperature[t], &w);
        for (int64_t e = 0; e < E; e++) {
            p[t * E + e] = laplace(scores[t * E + e] / temperature[t] - b.anchor - b.beyond);
        }
    }
    free_workspace(&w);
    return status;
}

/* h [E] = e / sum(e) for e_i = exp(-|z_i - b|) / 2, as a softmax: every e may underflow at once. Returns S = sum(e). */
static double densities(int64_t E, const double *scores, double temperature, threshold b, double *h) {
    double nearest = INFINITY, sum = 0.0;
    for (int64_t e = 0; e < E; e++) {
        h[e] = fabs(scores[e] / temperature - b.anchor - b.beyond);
        nearest = fmin(nearest, h[e]);
    }
    for (int64_t e = 0; e < E; e++) sum += h[e] = exp(nearest - h[e]);
    for (int64_t e = 0; e < E; e++) h[e] /= sum;
    return 0.5 * sum * exp(-nearest);
}

int dotmoe_soft_top_k_backward(int64_t T, int64_t E, const double *scores, const double *k, const double *temperature,
                               const double *dp, double *dscores, double *dk, double *dtemperature) {
    workspace w;
    int status = check_soft_top_k(T, E, scores, k, temperature);
    if (status != DOTMOE_OK) return status;
    if (missing(dp, T)) return DOTMOE_NULL;
    status = new_workspace(E, &w);
    for (int64_t t = 0; t < T && status == DOTMOE_OK; t++) {
        const double *r = scores + t * E, *g = dp + t * E, alpha = temperature[t];
        const threshold b = find_threshold(E, r, k[t], alpha, &w);
        double *h = w.s; /* the sorted scores are done with */
        const double scale = densities(E, r, alpha, b, h) / alpha;
        double mean = 0.0, moment = 0.0; /* <h, G> and <dr, r> */
        for (int64_t e = 0; e < E; e++) mean += h[e] * g[e];
        for (int64_t e = 0; e < E; e++) {
            const double dr = scale * h[e] * (g[e] - mean);
            if (dscores != NULL) dscores[t * E + e] = dr;
            moment += dr * r[e];
        }
        if (dk != NULL) dk[t] = mean;
        if (dtemperature != NULL) dtemperature[t] = -moment / alpha;
    }
    free_workspace(&w);
    return status;
}
