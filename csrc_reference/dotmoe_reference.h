/* The method in plain C99 and float64: an oracle for the tests, and the page to read before writing a port.
 *
 * A dense FFN of F neurons becomes E experts, of which a router picks K for every token. One file a step:
 *   transport.c     affinity A [F, E] -> soft plan P [F, E], its exact adjoint, its implicit gradient
 *   rounding.c      scores -> expert_of [F], exactly c_e neurons an expert; the gap certificate
 *   permutation.c   expert_of -> the order in which the neurons are stored; weights -> expert blocks and back
 *   routing.c       router logits Z [T, E] -> K experts a token, load, losses, dZ
 *   soft_topk.c     LapSum: p in [0, 1]^E with sum exactly k
 *   dispatch.c      tokens -> slots sorted by expert, and back
 *   experts.c       grouped matrix product, the routed FFN, the masked dense FFN that learns
 *
 * Symbols: T tokens, H hidden, F FFN width, E experts, s = F / E, K experts a token, S = T K slots.
 * Arrays are dense and row-major, the last index fastest; [F, E] is the shape. There are no leading dimensions: a
 * caller with L layers calls L times. All quantities are dimensionless; logarithms are natural.
 * Index E marks an empty slot everywhere; its weight is 0.
 *
 * Every function returns 0 or one of the negative codes below. Arguments are checked before anything is written, except
 * for DOTMOE_NO_MEMORY and DOTMOE_SINGULAR, after which the outputs are unspecified. Outputs must not overlap inputs or
 * one another. "may be NULL" is said where it holds; an array without elements may always be NULL. Gradients are written,
 * never added to what is there; a gradient output that is NULL is skipped. There is no state: calls may run in parallel. */
#ifndef DOTMOE_REFERENCE_H
#define DOTMOE_REFERENCE_H

#include <stdint.h>

enum dotmoe_status {
    DOTMOE_OK = 0,
    DOTMOE_NULL = -1,      /* a required pointer is NULL */
    DOTMOE_BAD_SIZE = -2,  /* a dimension is too small, or an array too large to address */
    DOTMOE_BAD_SCALAR = -3, /* a scalar or an option outside its range (also NaN) */
    DOTMOE_BAD_VALUE = -4, /* an array element outside its range (also NaN) */
    DOTMOE_NO_MEMORY = -5, /* a workspace could not be allocated */
    DOTMOE_SINGULAR = -6   /* a linear system without a solution in float64 */
};

/* ---- transport: maximise <A, P> + tau H(P) over P 1 = 1, P^T 1 = c ---- */

enum dotmoe_final { DOTMOE_FINAL_ROW = 0, DOTMOE_FINAL_COLUMN = 1 };

/* Log-domain Sinkhorn-Knopp. X = A / tau; a step is
 *     f_i = -LSE_e(X_ie + g_e),   g_e = log c_e - LSE_i(X_ie + f_i),
 * and P_ie = exp(X_ie + f_i + g_e). DOTMOE_FINAL_ROW takes one more f after the last step, so rows sum to 1 exactly and the
 * error is in the columns; DOTMOE_FINAL_COLUMN does not, and then columns sum to c_e exactly.
 *   F, E >= 1         affinity [F, E], finite
 *   capacity [E]      > 0, sums to F to within 1e-4 F; NULL = F / E each. May be fractional, in neurons
 *   tau > 0           num_iters >= 0 steps at most
 *   tol >= 0          stops once every column sum, taken before the step's column update, is within tol of c_e (relative);
 *                     the update is still applied. 0 never stops
 *   init [E]          first g; may be NULL (zeros)
 *   plan [F, E], log_u [F] = f, log_v [E] = g
 *   taken [1]         steps taken
 *   error [1]         max_e |sum_i P_ie / c_e - 1|  (row)  or  max_i |sum_e P_ie - 1|  (column)
 *   history [num_iters + 1, E]   g_0 .. g_taken, all that the adjoint needs; may be NULL */
int dotmoe_sinkhorn(int64_t F, int64_t E, const double *affinity, const double *capacity, double tau, int64_t num_iters,
                    double tol, const double *init, int final, double *plan, double *log_u, double *log_v, int64_t *taken,
                    double *error, double *history);

/* Exact adjoint of the steps taken, from g_0 .. g_taken only: O(F + E) memory instead of O(taken F E).
 *   affinity, capacity, tau, final   as given to dotmoe_sinkhorn; taken, history [taken + 1, E] as it returned them
 *   dplan [F, E]      G = dL/dP
 *   daffinity [F, E]  required: dX is summed up in it
 *   dtau [1]; dcapacity [E]; dinit [E] = dL/dg_0 */
int dotmoe_sinkhorn_backward(int64_t F, int64_t E, const double *affinity, const double *capacity, double tau, int64_t taken,
                             const double *history, int final, const double *dplan, double *daffinity, double *dtau,
                             double *dcapacity, double *dinit);

/* Gradient at the fixed point, from the plan alone: exact once the steps have converged. With r = P 1, q = P^T 1,
 * a = sum_e P * G, b = sum_i P * G:
 *     [diag(q) - P^T diag(1/r) P] y = b - P^T (a / r),  x = (a - P y) / r,  dA = P * (G - x_i - y_e) / tau,  dc = y.
 * The matrix is a graph Laplacian: its diagonal is built as minus the off-diagonal sum, since q - (...) would cancel on hard
 * plans. Its null vector 1 is removed by adding q q^T / sum(q), which fixes the free constant in dc by sum_e q_e y_e = 0.
 *   plan [F, E] >= 0, no empty row     ridge >= 0: added to the diagonal, as a share of the mean q (1e-12 serves; 0 returns
 *                                      DOTMOE_SINGULAR where the plan is exactly hard, and there the gradient is 0)
 *   daffinity [F, E]; dtau [1]; dcapacity [E] */
int dotmoe_sinkhorn_implicit_backward(int64_t F, int64_t E, const double *affinity, double tau, double ridge,
                                      const double *plan, const double *dplan, double *daffinity, double *dtau,
                                      double *dcapacity);

/* ---- rounding: exactly capacity[e] neurons an expert ---- */

/* Visits the pairs (i, e) in descending order of score, equal scores in row-major order; takes a pair if neuron i is free and
 * expert e has room. O(F E log(F E)).
 *   F, E >= 1         scores [F, E], no NaN (log_u + log_v + A / tau is a better ranking than P, which saturates)
 *   capacity [E]      >= 0, sums to F; NULL = F / E each, the first F % E experts one more
 *   expert_of [F]     in [0, E) */
int dotmoe_greedy_assignment(int64_t F, int64_t E, const double *scores, const int64_t *capacity, int64_t *expert_of);

/* The same answer by deferred acceptance: in every round each free neuron proposes to its best expert that has not refused
 * it; every expert holds its best capacity[e] proposers so far and refuses the others. All proposals of a round are
 * independent, which is what a parallel port uses. Arguments as above; rounds [1], proposals [1]: may be NULL. */
int dotmoe_proposal_assignment(int64_t F, int64_t E, const double *scores, const int64_t *capacity, int64_t *expert_of,
                               int64_t *rounds, int64_t *proposals);

/* gap [1] = sum_i (max_e scores_ie - scores_i,expert_of(i)) >= 0. With scores = X + f + g it bounds what the assignment loses
 * against the best one of the same capacities, in units of tau. scores finite. */
int dotmoe_assignment_gap(int64_t F, int64_t E, const double *scores, const int64_t *expert_of, double *gap);

/* ---- permutation: the neurons sorted by expert ---- */

/* order [F]: neuron order[n] is stored at position n; stable within an expert. F >= 0, E >= 1, expert_of [F] in [0, E). */
int dotmoe_neuron_order(int64_t F, int64_t E, const int64_t *expert_of, int64_t *order);

/* inverse [F]: neuron i is stored at position inverse[i]. order must be a permutation of 0 .. F - 1. */
int dotmoe_inverse_order(int64_t F, const int64_t *order, int64_t *inverse);

/* gate_proj, up_proj [F, H], down_proj [H, F] -> gate_up_proj [E, 2s, H] (gate rows first), down_blocks [E, H, s].
 * F, E, H >= 1, F % E == 0; order as from dotmoe_neuron_order. The second function is the exact inverse of the first. */
int dotmoe_expert_blocks(int64_t F, int64_t E, int64_t H, const int64_t *order, const double *gate_proj, const double *up_proj,
                         const double *down_proj, double *gate_up_proj, double *down_blocks);
int dotmoe_dense_weights(int64_t F, int64_t E, int64_t H, const int64_t *order, const double *gate_up_proj,
                         const double *down_blocks, double *gate_proj, double *up_proj, double *down_proj);

/* ---- routing: K experts a token ---- */

enum dotmoe_weights { DOTMOE_UNIT = 0, DOTMOE_SOFTMAX = 1, DOTMOE_RENORMALIZED = 2 };

/* The K largest logits of each token, best first, ties to the lower index. Q = softmax(Z). Over the valid tokens:
 *     load_e = share of the routed slots that expert e received,  balance = E sum_e load_e mean_t Q_te (1 when balanced),
 *     z_loss = mean_t LSE_e(Z_te)^2.
 * Weights: UNIT 1 (straight-through: its gradient is that of SOFTMAX), SOFTMAX Q, RENORMALIZED Q / (sum of the chosen Q).
 *   T >= 0, 1 <= K <= E        logits [T, E]: no NaN, and a finite row maximum (-inf forbids an expert)
 *   mask [T]                   0 marks padding: no slots, no part in load and losses; may be NULL (all valid)
 *   indices [T, K], weights [T, K], probs [T, E] = Q (of padding too), load [E], balance_loss [1], z_loss [1];
 *   without a valid token load and losses are 0 */
int dotmoe_route_top_k(int64_t T, int64_t E, int64_t K, const double *logits, const uint8_t *mask, int mode, int64_t *indices,
                       double *weights, double *probs, double *load, double *balance_loss, double *z_loss);

/* dlogits [T, E] = dL/dZ of everything the router feeds: the weights, Q itself, the balance loss and the z loss.
 *   logits, mask, mode as before; indices [T, K], load [E] as returned (load counts slots: a constant)
 *   dweights [T, K], dprobs [T, E]: may be NULL (zero); dbalance, dz: dL/d(balance_loss), dL/d(z_loss) */
int dotmoe_route_top_k_backward(int64_t T, int64_t E, int64_t K, const double *logits, const uint8_t *mask, int mode,
                                const int64_t *indices, const double *load, const double *dweights, const double *dprobs,
                                double dbalance, double dz, double *dlogits);

/* ---- soft_topk: LapSum ---- */

/* p_ti = Phi(r_ti / alpha_t - b_t), Phi the Laplace distribution function, b_t such that sum_i p_ti = k_t; closed form.
 *   T >= 0, E >= 1    scores r [T, E], |r / alpha| <= 1e300
 *   k [T]             strictly between 0 and E         temperature alpha [T] > 0
 *   p [T, E] */
int dotmoe_soft_top_k(int64_t T, int64_t E, const double *scores, const double *k, const double *temperature, double *p);

/* With e_i = exp(-|r_i / alpha - b|) / 2, S = sum_i e_i, h = e / S and G = dL/dp [T, E]:
 *     dk = <h, G>,  dr = (S / alpha) h * (G - dk),  dalpha = -<dr, r> / alpha.
 *   dscores [T, E], dk [T], dtemperature [T] */
int dotmoe_soft_top_k_backward(int64_t T, int64_t E, const double *scores, const double *k, const double *temperature,
                               const double *dp, double *dscores, double *dk, double *dtemperature);

/* ---- dispatch: slot p of the expert-sorted order serves the routed pair source[p] = t K + j ---- */

/* Stable counting sort of the S = T K routed pairs by expert, empty slots last.
 *   T, K >= 0, E >= 1, S < 2^31     indices [T, K] in [0, E]
 *   token [S] = source / K, source [S], offsets [E + 1]: expert e owns the slots [offsets[e], offsets[e + 1]) */
int dotmoe_dispatch_tokens(int64_t T, int64_t K, int64_t E, const int64_t *indices, int64_t *token, int64_t *source,
                           int32_t *offsets);

/* x [T, H] -> xs [S, H], xs_p = x_token(p); rows p >= used are zero. used = offsets[E]. token [S] in [0, T). */
int dotmoe_scatter_tokens(int64_t T, int64_t H, int64_t S, int64_t used, const int64_t *token, const double *x, double *xs);

/* dxs [S, H] -> dx [T, H], dx_t = sum of the used rows of token t. */
int dotmoe_scatter_tokens_backward(int64_t T, int64_t H, int64_t S, int64_t used, const int64_t *token, const double *dxs,
                                   double *dx);

/* ys [S, H], weights [T, K] -> y [T, H], y_t = sum over the used slots p of t of weights[source(p)] ys_p. S = T K;
 * source [S] in [0, S). */
int dotmoe_gather_tokens(int64_t T, int64_t H, int64_t K, int64_t used, const int64_t *source, const double *ys,
                         const double *weights, double *y);

/* dy [T, H] -> dys [S, H] = weights[source(p)] dy_t (0 beyond used), dweights [T, K] = <ys_p, dy_t> (0 where unused). */
int dotmoe_gather_tokens_backward(int64_t T, int64_t H, int64_t K, int64_t used, const int64_t *source, const double *ys,
                                  const double *weights, const double *dy, double *dys, double *dweights);

/* ---- experts ---- */

enum dotmoe_activation { DOTMOE_SILU = 0, DOTMOE_GELU = 1, DOTMOE_GELU_TANH = 2 }; /* silu, gelu, gelu_pytorch_tanh */

/* y [n] = act(x), dydx [n] = act'(x); either may be NULL. n >= 0. */
int dotmoe_activate(int activation, int64_t n, const double *x, double *y, double *dydx);

/* y [S, N]: row p of expert e, offsets[e] <= p < offsets[e + 1], is a_p b_e; rows p >= offsets[E] are zero.
 *   S, D, N >= 0, E >= 1      a [S, D]
 *   b [E, D, N]               element (e, d, n) at b[e stride_e + d stride_d + n stride_n], strides >= 0 in elements
 *   offsets [E + 1]           starts at 0, never falls, ends at S or below */
int dotmoe_grouped_mm(int64_t S, int64_t D, int64_t N, int64_t E, const double *a, const double *b, int64_t stride_e,
                      int64_t stride_d, int64_t stride_n, const int32_t *offsets, double *y);

/* dy [S, N] -> da [S, D] (0 beyond the last row), db with the strides of b: all its E D N elements, 0 for an empty expert. */
int dotmoe_grouped_mm_backward(int64_t S, int64_t D, int64_t N, int64_t E, const double *a, const double *b, int64_t stride_e,
                               int64_t stride_d, int64_t stride_n, const int32_t *offsets, const double *dy, double *da,
                               double *db);

/* y_t = sum_j w_tj Down_e (act(Gate_e x_t) * (Up_e x_t)), e = indices[t, j]: dispatch, scatter, two grouped products, gather.
 *   x [T, H], gate_up_proj [E, 2s, H] (gate rows first), down_proj [E, H, s], indices [T, K] in [0, E], weights [T, K]
 *   y [T, H] */
int dotmoe_expert_ffn(int64_t T, int64_t H, int64_t E, int64_t s, int64_t K, const double *x, const double *gate_up_proj,
                      const double *down_proj, const int64_t *indices, const double *weights, int activation, double *y);

/* dy [T, H] -> dx, dgate_up_proj, ddown_proj, dweights, each in the shape of what it belongs to. Recomputes the forward. */
int dotmoe_expert_ffn_backward(int64_t T, int64_t H, int64_t E, int64_t s, int64_t K, const double *x,
                               const double *gate_up_proj, const double *down_proj, const int64_t *indices,
                               const double *weights, int activation, const double *dy, double *dx, double *dgate_up_proj,
                               double *ddown_proj, double *dweights);

/* Eq. 4 in its hard forward form: y = (U * N) Wd^T, U = act(x Wg^T) * (x Wu^T) [T, F], N_tf = R_t,expert_of(f),
 * R_te = sum of weights[t, j] over the j with indices[t, j] = e.
 *   x [T, H], gate_proj, up_proj [F, H], down_proj [H, F], expert_of [F] in [0, E), indices [T, K] in [0, E]
 *   weights [T, K]: may be NULL (1 each)       y [T, H] */
int dotmoe_masked_ffn(int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, const double *x, const double *gate_proj,
                      const double *up_proj, const double *down_proj, const int64_t *expert_of, const int64_t *indices,
                      const double *weights, int activation, double *y);

/* dy [T, H] -> the gradients of the tensors, and the straight-through gradients of eq. 3: with D = U * (dy Wd) [T, F],
 *     drouting [T, E] = D M (the gradient to R, so to the router's Q),  dassignment [F, E] = D^T R (to M, so to the plan P).
 * Neither needs M as a matrix: the first sums D over the neurons of each expert, the second visits the experts of each token.
 * Workspace O(F + E) numbers. dweights [T, K] = drouting at indices. */
int dotmoe_masked_ffn_backward(int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, const double *x, const double *gate_proj,
                               const double *up_proj, const double *down_proj, const int64_t *expert_of, const int64_t *indices,
                               const double *weights, int activation, const double *dy, double *dx, double *dgate_proj,
                               double *dup_proj, double *ddown_proj, double *dassignment, double *drouting, double *dweights);

#endif
