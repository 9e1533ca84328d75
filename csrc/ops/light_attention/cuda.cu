// A layer step on a GPU: passes over maps (cuda_passes.h), and between them kernels on [batch,
// channels] (cuda_small.h) and the cell's own. Sums are left by pieces; a launch adds these up.
#include "ops/light_attention/op.h"

#include <algorithm>

#include "common/cuda/statistics.h"
#include "ops/light_attention/cuda_small.h"

namespace dla::cuda {
namespace {

using namespace light;

template <class T>
struct Step : AttentionStep<T, LightAttentionInputs> {
  using Base = AttentionStep<T, LightAttentionInputs>;
  using A = Compute<T>;
  using Base::args, Base::planes, Base::area, Base::call, Base::small, Base::map, Base::dynamic;
  const Fields<const A> summary;

  Step(const char* name, const LightAttentionInputs& args, const void* summary)
      : Base(name, args), summary{small(summary), planes} {}

  bool gated() const { return dynamic() && args.p != nullptr; }
  // For a pass with `bytes` of shared memory for every pixel.
  Tiling tiling(int halo, int bytes, std::initializer_list<const void*> maps) const {
    return tile_map<T>(args.channels_last, args.batch, args.channels, args.height, args.width, halo,
                       bytes, maps);
  }

  Features<T> features(const void* branch_mean, const void* branch_var) const {
    const bool none = args.branch_norm == Norm::none;
    return {map(args.x), map(args.p), args.join,
            {small(args.branch_weight), small(args.branch_bias),
             none ? nullptr : small(branch_mean), none ? nullptr : small(branch_var),
             args.branch_eps}};
  }
  Mixture<A> mixture() const {
    return {small(args.v_weight), small(args.prev_weight), summary[kAttention], summary[kGate],
            small(args.lam)};
  }
  OutputNorm<A> norm(const void* mean, const void* var) const {
    return {this->channel_norm(mean, var), small(args.drop_scale)};
  }
  ScoreWeights<A> scores() const {
    return {small(args.q_weight), small(args.k_weight), static_cast<int>(args.kernel_size),
            static_cast<int>(args.channels), static_cast<int>(args.head_dim)};
  }
  Planes<A> planes_of(const A* table) const {
    return {args.batch, args.channels, static_cast<double>(area), {table, planes}, summary,
            small(args.lam)};
  }

  template <class To>
  void fold(Size fields, Size pieces, const A* partial, const To& to) const {
    launch(call, fold_kernel<A, To>, grid_of(fields * planes), fields, planes, args.channels,
           pieces, partial, to);
  }
};

// ---- forward ------------------------------------------------------------------------------------

template <class T>
struct ForwardStep : Step<T> {
  using A = Compute<T>;
  using Step<T>::call, Step<T>::planes, Step<T>::area, Step<T>::small, Step<T>::map,
      Step<T>::dynamic, Step<T>::gated;

  const LightAttentionForward& args;
  const int moments_bytes;
  const Tiling moments;
  const Fields<A> found;
  A *partial, *table, *gate_state;

  explicit ForwardStep(const LightAttentionForward& args)
      : Step<T>("light_attention", args, args.summary),
        args(args),
        moments_bytes(bytes_of<T>({args.x, args.p})),
        moments(this->tiling(1, moments_bytes, {args.x, args.p})),
        found{small(args.summary), planes} {
    partial = this->scratch.take(kFeatureSums * planes * moments.pieces());
    table = this->scratch.take(kPlaneFields * planes);
    gate_state = gated() ? this->scratch.take(this->slots() * planes) : nullptr;
  }

  // Statistics of the branch, if they are of the batch.
  Features<T> prepare_branch() const {
    if (args.branch_norm == Norm::batch) {
      const Cut cut = cut_pieces<T>(args.batch, args.channels, area, args.channels_last,
                                    moments.pieces(), {args.x});
      A *means = partial, *squares = partial + piece_rows(cut) * args.channels;
      launch(call, moments_kernel<T>, {cut.blocks, kThreads}, cut, map(args.x), means, squares);
      launch(call, statistics_kernel<A>, channel_grid(args.channels), cut, means, squares,
             small(args.branch_mean), small(args.branch_var));
    }
    const bool running = args.branch_norm == Norm::running;
    return this->features(running ? args.branch_mean_in : args.branch_mean,
                          running ? args.branch_var_in : args.branch_var);
  }

  // Pooled values, with the moments if the norm needs them.
  void pool(const Features<T>& in) const {
    const double pixels = static_cast<double>(area);
    if (args.norm != Norm::batch) return pool_alone(in);
    with_format(args.channels_last, [&](auto last) {
      launch(call, plane_moments_kernel<T, last.value, false>, tile_grid(moments, moments_bytes),
             moments, in, this->mixture(), Arriving<T>{}, KnownMeans<A>{}, partial,
             table + kShiftU * planes);
    });
    this->fold(kFeatureSums, moments.pieces(), partial,
               ToTable<A>{pixels, {table, planes}, found[kMeanX],
                          gated() ? found[kMeanP] : nullptr});
  }

  void pool_alone(const Features<T>& in) const {
    const Cut cut = cut_pieces<T>(args.batch, args.channels, area, args.channels_last,
                                  moments.pieces(), {in.x, in.p});
    launch(call, means_kernel<T>, {cut.blocks, kThreads}, cut, in, partial,
           partial + piece_rows(cut) * args.channels);
    this->fold(gated() ? 2 : 1, cut.chunks, partial,
               Multiples<A>{1.0 / static_cast<double>(area), found[kMeanX]});
  }

  // From the pooled values: scores, new state, gates.
  void small_part() const {
    const Size heads = planes / args.head_dim;
    launch(call, scores_kernel<A>, grid_of(heads * kWarp), heads, this->scores(), found[kMeanX],
           found[kAttention]);
    if (dynamic()) this->evaluate_cell(found[kMeanX], args.state, args.batch, args.new_state);
    if (gated())
      this->evaluate_cell(found[kMeanP], args.new_state, args.batch, gate_state,
                          args.first_sample);
    launch(call, gates_kernel<A>, grid_of(planes), planes, gated() ? gate_state : nullptr,
           args.sigmoid_gate, found[kGate], found[kMeanP]);
  }

  void run() const {
    const Features<T> in = prepare_branch();
    pool(in);
    small_part();
    if (args.norm == Norm::batch)
      launch(call, output_statistics_kernel<A>, channel_grid(args.channels),
             this->planes_of(table), found, small(args.mean), small(args.var));
    const bool running = args.norm == Norm::running;
    const auto norm = this->norm(running ? args.mean_in : args.mean,
                                 running ? args.var_in : args.var);
    with_format(args.channels_last, [&](auto last) {
      const int bytes = last.value ? bytes_of<T>({args.x, args.p})
                                   : bytes_of<T>({args.x, args.p, args.out, args.o});
      const Tiling plan = this->tiling(1, bytes, {args.x, args.p, args.out, args.o});
      launch(call, stencil_kernel<T, last.value>, tile_grid(plan, bytes), plan, in,
             this->mixture(), norm, args.residual, map(args.out), map(args.o));
    });
  }
};

// ---- backward -----------------------------------------------------------------------------------

template <class T>
struct BackwardStep : Step<T> {
  using A = Compute<T>;
  using Step<T>::call, Step<T>::planes, Step<T>::area, Step<T>::small, Step<T>::map,
      Step<T>::dynamic, Step<T>::gated, Step<T>::summary;

  const LightAttentionBackward& args;
  const int moments_bytes, map_bytes;  // shared memory for a pixel, of both passes
  const Tiling moments, gradients;
  const Size state_size;  // elements of a state
  T* normed_dx;           // gradient of the normed branch, where dx is not that or a multiple of it
  A *partial, *table;
  ChannelGradients<A> found;
  A *grad_state, *of_gates;  // of the new state: altogether, and the gates' share
  A *dy_of_cell, *dy, *dpooled_p, *score_grads, *dfilters;
  Factors<A> branch_factors;
  A* cell_scratch;

  explicit BackwardStep(const LightAttentionBackward& args)
      : Step<T>("light_attention_backward", args, args.summary),
        args(args),
        moments_bytes(bytes_of<T>({args.x, args.p, args.grad_out, args.grad_o})),
        map_bytes(moments_bytes + static_cast<int>(sizeof(A))),
        moments(this->tiling(1, moments_bytes, {args.x, args.p, args.grad_out, args.grad_o})),
        gradients(this->tiling(2, map_bytes, {args.x, args.p, args.grad_out, args.grad_o,
                                              args.dx, args.dp})),
        state_size(this->slots() * planes) {
    const Size channels = args.channels;
    auto& memory = this->scratch;
    const bool normed = args.branch_norm == Norm::batch;
    normed_dx = reinterpret_cast<T*>(
        memory.take(normed ? ceil_div(planes * area, kPack<T>) * kPack<A> : 0));
    // More than the first pass leaves. Its sums of whole planes are their table, which is done with
    // when the second pass begins.
    partial = memory.take(kMapGradientSums * planes *
                          std::max(moments.pieces(), gradients.pieces()));
    table = moments.pieces() == 1 ? partial : memory.take(kGradientFields * planes);
    found.out_scale = memory.take(planes);
    found.da = memory.take(planes);
    found.dgate = gated() ? memory.take(state_size) : nullptr;
    found.slots = this->slots();
    found.mean = memory.take(channels);
    found.slope = memory.take(channels);
    found.level = memory.take(channels);
    found.dlam = small(args.dlam);
    found.dnorm_weight = small(args.dnorm_weight);
    found.dnorm_bias = small(args.dnorm_bias);
    grad_state = memory.take(state_size);
    of_gates = gated() ? memory.take(state_size) : nullptr;
    dy_of_cell = dynamic() ? memory.take(planes) : nullptr;
    dpooled_p = gated() ? memory.take(planes) : nullptr;
    dy = memory.take(planes);
    score_grads = memory.take(2 * planes);
    dfilters = memory.take(2 * args.kernel_size * args.batch);
    branch_factors = {memory.take(channels), memory.take(channels), memory.take(channels)};
    cell_scratch = memory.take(dynamic() ? args.batch * (5 * channels + 4 * args.hidden) : 0);
  }

  void channel_gradients(const Features<T>& in, const Arriving<T>& arriving) const {
    const bool filtered = args.norm == Norm::batch;
    const KnownMeans<A> means{summary[kMeanX], filtered || gated() ? summary[kMeanP] : nullptr,
                              filtered ? summary[kMeanU] : nullptr,
                              filtered ? summary[kMeanE] : nullptr};
    with_format(args.channels_last, [&](auto last) {
      launch(call, plane_moments_kernel<T, last.value, true>, tile_grid(moments, moments_bytes),
             moments, in, this->mixture(), arriving, means, partial,
             table + kGradientShiftU * planes);
    });
    if (partial != table)
      this->fold(kGradientSums, moments.pieces(), partial, Multiples<A>{1.0, table});
    launch(call, channel_gradients_kernel<A>, channel_grid(args.channels), this->planes_of(table),
           this->norm(args.mean, args.var), args.norm == Norm::batch, args.sigmoid_gate, found);
  }

  // Of both evaluations, the gates' first.
  void cell_gradients() const {
    if (gated())
      this->differentiate_cell(found.dgate, summary[kMeanP], args.new_state, args.batch,
                               dpooled_p, of_gates, args.dcell_params, cell_scratch, false,
                               args.first_sample);
    launch(call, state_gradients_kernel<A>, grid_of(state_size), state_size, args.batch,
           args.channels, small(args.grad_state), gated() ? args.batch : 0, of_gates,
           args.first_sample, grad_state);
    this->differentiate_cell(grad_state, summary[kMeanX], args.state, args.batch, dy_of_cell,
                             args.dstate, args.dcell_params, cell_scratch, gated());
  }

  void score_gradients() const {
    launch(call, score_gradients_kernel<A>, {args.batch, kThreads}, args.batch, this->scores(),
           summary[kMeanX], summary[kAttention], found.da, dy_of_cell, score_grads, dy, dfilters);
    const FilterGradients<A> to{small(args.dq_weight), small(args.dk_weight)};
    launch(call, fold_kernel<A, FilterGradients<A>>, grid_of(2 * args.kernel_size), 2,
           args.kernel_size, args.kernel_size, args.batch, dfilters, to);
  }

  void map_gradients(const Features<T>& in, const Arriving<T>& arriving) const {
    const bool through_norm = args.norm == Norm::batch;
    const GradientFactors<A> factors{found.out_scale, found.mean,
                                     through_norm ? found.slope : nullptr, found.level};
    const Gradients<T> pass{gradients, in, this->mixture(), arriving, factors, dy, dpooled_p,
                            args.residual && arriving.out != nullptr,
                            args.branch_norm == Norm::running,
                            args.branch_norm == Norm::batch ? normed_dx : map(args.dx),
                            map(args.dp), partial};
    with_format(args.channels_last, [&](auto last) {
      launch(call, gradients_kernel<T, last.value>, tile_grid(gradients, map_bytes), pass);
    });
    const Size fields = args.prev_weight == nullptr ? 9 : 18;
    launch(call, weight_gradients_kernel<A>, channel_grid(args.channels, fields),
           args.batch * gradients.pieces(), args.channels, partial, small(args.dv_weight),
           small(args.dprev_weight), small(args.lam));
  }

  void branch_gradients(const Features<T>& in) const {
    const Size rows = args.batch * gradients.pieces(), size = rows * args.channels;
    const bool of_batch = args.branch_norm == Norm::batch;
    launch(call, factors_kernel<A>, channel_grid(args.channels), rows, args.channels,
           static_cast<double>(args.batch * area), partial + kBranch * size,
           partial + kBranchWithZ * size, in.norm, of_batch, branch_factors,
           small(args.dbranch_weight), small(args.dbranch_bias));
    if (!of_batch) return;
    const Cut cut = cut_map<T>(args.batch, args.channels, area, args.channels_last, false,
                               {normed_dx, args.x, args.dx});
    launch(call, norm_gradient_kernel<T>, {cut.blocks, kThreads}, cut, normed_dx, in.x,
           in.norm.mean, branch_factors, map(args.dx));
  }

  void run() const {
    const Features<T> in = this->features(args.branch_mean, args.branch_var);
    const Arriving<T> arriving{map(args.grad_out), map(args.grad_o)};
    channel_gradients(in, arriving);
    if (dynamic()) cell_gradients();
    score_gradients();
    map_gradients(in, arriving);
    if (args.branch_norm != Norm::none) branch_gradients(in);
  }
};

}  // namespace

void light_attention_forward(const LightAttentionForward& args) {
  with_element_type(args.dtype, [&](auto element) {
    ForwardStep<decltype(element)>(args).run();
  });
}

void light_attention_backward(const LightAttentionBackward& args) {
  with_element_type(args.dtype, [&](auto element) {
    BackwardStep<decltype(element)>(args).run();
  });
}

std::int64_t light_attention_forward_scratch(const LightAttentionForward& args) {
  return scratch_of<ForwardStep>(args);
}
std::int64_t light_attention_backward_scratch(const LightAttentionBackward& args) {
  return scratch_of<BackwardStep>(args);
}

}  // namespace dla::cuda
