// The steps: passes over maps (cuda_passes.h), and between them the small part on [B, C]
// (cuda_memory.h) with the cell (ops/cell). Sums of pieces of maps are added up in small launches.
#include "ops/base_attention/op.h"

#include "ops/base_attention/cuda_memory.h"
#include "ops/base_attention/cuda_passes.h"

namespace dla::cuda {
namespace base {
namespace {

constexpr Size kPixels = 256;  // of a channels_last map, that a block sums up

// One of the maps that are not aligned to packs, if there is any.
const void* least_aligned(const std::vector<const void*>& maps) {
  for (const void* map : maps)
    if (!aligned_to_packs({map})) return map;
  return maps.front();
}

std::vector<const void*> joined(std::vector<const void*> one, const std::vector<const void*>& two) {
  one.insert(one.end(), two.begin(), two.end());
  return one;
}

// What forward and backward steps share.
template <class T>
struct Step : AttentionStep<T, BaseAttentionInputs> {
  using Base = AttentionStep<T, BaseAttentionInputs>;
  using A = Compute<T>;
  using Base::args, Base::planes, Base::area, Base::call, Base::scratch, Base::small, Base::map;
  const int layers, slots;
  const Size with_own;
  Memory<A> memory = {};
  A *inputs, *repeated_state, *outputs;  // of the cell, for all rows

  Step(const char* op, const BaseAttentionInputs& args, const void* y)
      : Base(op, args),
        layers(static_cast<int>(args.values.size())),
        slots(Base::slots()),
        with_own((layers + 1) * planes) {
    memory.layers = layers;
    memory.batch = static_cast<int>(args.batch);
    memory.channels = static_cast<int>(args.channels);
    memory.head_dim = static_cast<int>(args.head_dim);
    memory.taps = static_cast<int>(args.kernel_size);
    memory.dynamic = this->dynamic();
    memory.features = args.gated_features;
    memory.sigmoid = args.sigmoid_gate;
    memory.first_sample = args.first_sample;
    memory.y = small(y);
    memory.keys = small(args.keys);
    memory.gates = small(args.gates);
    memory.q_weight = small(args.q_weight);
    memory.k_weight = small(args.k_weight);
    for (std::size_t t = 0; t < args.pooled.size(); ++t) memory.pooled[t] = small(args.pooled[t]);
    for (std::size_t t = 0; t < args.key_weights.size(); ++t)
      memory.key_weights[t] = small(args.key_weights[t]);
    inputs = scratch.take(asked());
    repeated_state = scratch.take(slots * asked());
    outputs = scratch.take(slots * asked());
  }

  Size asked() const { return memory.rows() * args.channels; }
  Grid heads_grid() const { return grid_of(args.batch * memory.heads() * kWarp); }

  // For passes with sums, for those without, and for the products of many maps.
  Cut cut_sums(const std::vector<const void*>& maps) const {
    return cut_pieces<T>(args.batch, args.channels, area, args.channels_last,
                         ceil_div(area, kPixels), {least_aligned(maps)});
  }
  Cut cut_maps(const std::vector<const void*>& maps) const {
    return cut_map<T>(args.batch, args.channels, area, args.channels_last, false,
                      {least_aligned(maps)});
  }
  Cut cut_products(const std::vector<const void*>& maps) const {
    return cut_groups<T>(args.batch, args.channels, area, args.channels_last,
                         {least_aligned(maps)});
  }
  // Numbers of one kind that a pass with sums leaves, however it is cut.
  Size sums_size() const { return planes * (args.channels_last ? ceil_div(area, kPixels) : 1); }

  Mix<T> mix(const A* weights) const {
    Mix<T> mix{{}, map(args.x), small(args.v_weight), weights + layers * planes,
               static_cast<int>(args.height), static_cast<int>(args.width)};
    for (int t = 0; t < layers; ++t)
      mix.earlier.add(args.values[static_cast<std::size_t>(t)], weights + t * planes);
    return mix;
  }

  OutputNorm<A> norm(const void* mean, const void* var) const {
    return {this->channel_norm(mean, var), small(args.drop_scale), args.relu};
  }

  // The new state, and keys and gates of all layers under it.
  void recall(A* state, const Recall<A>& to) const {
    if (memory.dynamic) this->evaluate_cell(memory.y, args.state, args.batch, state);
    if (asked() > 0) {
      launch(call, cell_inputs_kernel<A>, grid_of(asked()), memory, slots, state, inputs,
             repeated_state);
      this->evaluate_cell(inputs, repeated_state, memory.rows(), outputs);
    }
    launch(call, recall_kernel<A>, grid_of(with_own), memory, outputs, to);
  }

  // to[i] = factor * the sum of the pieces of plane i % planes; `fields` sums of each.
  void fold(Size fields, const Cut& cut, const A* sums, double factor, A* to) const {
    launch(call, fold_kernel<A, Multiples<A>>, grid_of(fields * planes), fields, planes,
           args.channels, cut.chunks, sums, Multiples<A>{factor, to});
  }

  void weigh(const A* scores, const A* gates, A* weights) const {
    launch(call, weigh_kernel<A>, grid_of(with_own), memory, scores, gates, weights);
  }
};

// ---- forward ------------------------------------------------------------------------------------

template <class T>
struct ForwardStep : Step<T> {
  using A = Compute<T>;
  using Step<T>::area, Step<T>::call, Step<T>::memory, Step<T>::small, Step<T>::map;

  const BaseAttentionForward& args;
  Recall<A> recalled;
  A *weights, *sums[2], *kept_o;

  explicit ForwardStep(const BaseAttentionForward& args)
      : Step<T>("base_attention", args, args.pooled_x), args(args) {
    recalled = {small(args.keys_out), small(args.gates_out)};
    if (args.keys_out == nullptr) recalled.keys = this->scratch.take(this->with_own);
    weights = this->scratch.take(this->with_own);
    for (A*& of : sums) of = this->scratch.take(this->sums_size());
    kept_o = keeps_o() ? this->scratch.take(this->planes * area) : nullptr;
  }

  // Whether o is written between the two passes that need it, not formed anew: if that moves less.
  bool keeps_o() const {
    return args.norm == Norm::batch && this->layers > static_cast<int>(2 * sizeof(A) / sizeof(T));
  }

  // v and the means of x and v.
  void make_value() const {
    const Cut cut = this->cut_sums({args.x, args.v});
    launch(call, value_kernel<T>, {cut.blocks, kThreads}, cut, this->mix(weights), map(args.v),
           sums[0], sums[1]);
    void* const means[] = {args.pooled_x, args.pooled_v};
    for (int i = 0; i < 2; ++i)
      if (means[i] != nullptr)
        this->fold(1, cut, sums[i], 1.0 / static_cast<double>(area), small(means[i]));
  }

  void batch_statistics(const Mix<T>& mix) const {
    const Cut cut = this->cut_sums(joined(args.values, {args.x}));
    launch(call, mix_moments_kernel<T>, {cut.blocks, kThreads}, cut, mix, kept_o, sums[0], sums[1]);
    launch(call, statistics_kernel<A>, channel_grid(args.channels), cut, sums[0], sums[1],
           small(args.mean), small(args.var));
  }

  void run() const {
    make_value();
    this->recall(small(args.state_out), recalled);
    launch(call, scores_kernel<A>, this->heads_grid(), memory, recalled.keys, small(args.scores));
    this->weigh(small(args.scores), recalled.gates, weights);
    const Mix<T> mix = this->mix(weights);
    if (args.norm == Norm::batch) batch_statistics(mix);
    const bool running = args.norm == Norm::running;
    const OutputNorm<A> norm =
        this->norm(running ? args.mean_in : args.mean, running ? args.var_in : args.var);
    const Cut cut = this->cut_maps(joined(args.values, {args.x, args.out}));
    launch(call, output_kernel<T>, {cut.blocks, kThreads}, cut, mix, kept_o, norm, args.residual,
           map(args.out));
  }
};

// ---- backward -----------------------------------------------------------------------------------

template <class T>
struct BackwardStep : Step<T> {
  using A = Compute<T>;
  using Step<T>::area, Step<T>::call, Step<T>::memory, Step<T>::small, Step<T>::map;
  using Step<T>::planes, Step<T>::layers, Step<T>::slots;

  const BaseAttentionBackward& args;
  const int tile_bytes;  // of a pixel in shared memory
  const Tiling tiles;
  const bool arrives;  // a gradient at out
  Recall<A> recalled, grads;
  A *state, *grad_state, *weights, *dweights, *dlogits, *dqueries, *dy, *of_cell;
  A *doutputs, *dinputs, *drepeated_state, *cell_scratch, *filter_sums;
  A *sums[2], *products, *taps;
  Factors<A> factors;

  explicit BackwardStep(const BaseAttentionBackward& args)
      : Step<T>("base_attention_backward", args, args.pooled_x),
        args(args),
        tile_bytes(static_cast<int>(3 * sizeof(T))),
        tiles(tile_map<T>(args.channels_last, args.batch, args.channels, args.height, args.width, 1,
                          tile_bytes,
                          {args.x, args.dx, args.residual ? args.grad_out : nullptr,
                           least_aligned(value_maps())})),
        arrives(args.grad_out != nullptr) {
    take_memory();
  }

  int filters() const { return kEarlierKeys + static_cast<int>(args.dkey_weights.size()); }

  void take_memory() {
    auto& scratch = this->scratch;
    const Size with_own = this->with_own, asked = this->asked();
    recalled = {scratch.take(with_own), memory.dynamic ? scratch.take(with_own) : nullptr};
    grads = {scratch.take(with_own), scratch.take(with_own)};
    state = scratch.take(slots * planes);
    grad_state = scratch.take(slots * planes);
    weights = arrives ? small(args.weights) : scratch.take(with_own);
    dweights = arrives ? scratch.take(with_own) : nullptr;
    dlogits = scratch.take(with_own / args.head_dim);
    dqueries = scratch.take(planes);
    dy = scratch.take(planes);
    of_cell = memory.dynamic ? scratch.take(planes) : nullptr;
    doutputs = scratch.take(slots * asked);
    dinputs = scratch.take(asked);
    drepeated_state = scratch.take(slots * asked);
    const Size rows = std::max(memory.rows(), args.batch);
    cell_scratch = scratch.take(memory.dynamic ? rows * (5 * args.channels + 4 * args.hidden) : 0);
    filter_sums = scratch.take(filters() * args.batch * args.kernel_size);
    for (A*& of : sums) of = scratch.take(arrives ? this->sums_size() : 0);
    const Cut cut = product_cut();
    products = scratch.take(arrives ? with_own * cut.chunks : 0);
    taps = scratch.take(kTaps * planes * tiles.pieces());
    for (A** of : {&factors.scale, &factors.of_x, &factors.added})
      *of = scratch.take(args.channels);
  }

  std::vector<const void*> maps() const { return joined(args.values, {args.x, args.grad_out}); }
  Cut product_cut() const { return this->cut_products(joined(maps(), {args.g})); }

  // g and dweights from the gradient of out; those of the norm.
  void branch_gradients() const {
    const Mix<T> mix = this->mix(weights);
    const OutputNorm<A> norm = this->norm(args.mean, args.var);
    const bool normed = args.norm != Norm::none;
    if (normed) {
      const Cut cut = this->cut_sums(maps());
      launch(call, norm_sums_kernel<T>, {cut.blocks, kThreads}, cut, mix, norm, map(args.grad_out),
             sums[0], sums[1]);
      launch(call, factors_kernel<A>, channel_grid(args.channels), piece_rows(cut), args.channels,
             static_cast<double>(args.batch * area), sums[0], sums[1], norm.norm,
             args.norm == Norm::batch, factors, small(args.dnorm_weight), small(args.dnorm_bias));
    }
    const Cut cut = product_cut();
    launch(call, mix_gradients_kernel<T>, {cut.blocks, kThreads}, cut, mix, norm,
           map(args.grad_out), normed ? factors.of_x : nullptr, normed ? factors.added : nullptr,
           map(args.g), products);
    this->fold(layers + 1, cut, products, 1, dweights);
  }

  // From dweights and the gradients of the results, those of all inputs but the maps; dy.
  void memory_gradients() const {
    const Recall<const A> arriving{small(args.grad_keys), small(args.grad_gates)};
    launch(call, logit_gradients_kernel<A>, this->heads_grid(), memory, small(args.scores),
           recalled.gates, dweights, dlogits);
    launch(call, recall_gradients_kernel<A>, grid_of(planes), memory, small(args.scores), dlogits,
           recalled.keys, dweights, arriving, dqueries, grads);
    filter_gradients();
    MemoryGradients<A> to{small(args.dkeys), small(args.dgates), {}};
    for (std::size_t t = 0; t < args.dpooled.size(); ++t) to.pooled[t] = small(args.dpooled[t]);
    if (layers > 0)
      launch(call, factor_gradients_kernel<A>, grid_of(layers * planes), memory, slots,
             this->outputs, recalled, grads, to, doutputs);
    if (memory.dynamic) cell_gradients(to);
    launch(call, pooled_gradients_kernel<A>, grid_of(planes), memory, small(args.grad_pooled_x),
           of_cell, dqueries, grads.keys, dy);
  }

  void filter_gradients() const {
    FilterGradients<A> to{{small(args.dq_weight), small(args.dk_weight)}};
    for (std::size_t t = 0; t < args.dkey_weights.size(); ++t)
      to.of[kEarlierKeys + t] = small(args.dkey_weights[t]);
    launch(call, filter_sums_kernel<A>, grid_of(filters() * args.batch * kWarp), memory, filters(),
           recalled.gates, dqueries, grads.keys, filter_sums);
    launch(call, fold_kernel<A, FilterGradients<A>>, grid_of(filters() * args.kernel_size),
           filters(), args.kernel_size, args.kernel_size, args.batch, filter_sums, to);
  }

  // Of all evaluations: those of the gates, then the step's own, which receives what the gates
  // leave at the new state.
  void cell_gradients(const MemoryGradients<A>& to) const {
    const bool gated = this->asked() > 0;
    if (gated) {
      this->differentiate_cell(doutputs, this->inputs, this->repeated_state, memory.rows(),
                               dinputs, drepeated_state, args.dcell_params, cell_scratch, false);
      launch(call, input_gradients_kernel<A>, grid_of(layers * planes), memory, dinputs, to);
    }
    launch(call, state_gradients_kernel<A>, grid_of(slots * planes), slots * planes, args.batch,
           args.channels, small(args.grad_state), memory.rows(), drepeated_state,
           args.first_sample, grad_state);
    this->differentiate_cell(grad_state, memory.y, args.state, args.batch, of_cell, args.dstate,
                             args.dcell_params, cell_scratch, gated);
  }

  // Maps of which the gradient of v may be read.
  std::vector<const void*> value_maps() const {
    return joined(args.later_grads, {args.g, args.grad_v, args.dv});
  }

  // What arrives at v: from this layer's o, from later layers, from elsewhere.
  Terms<T> value_terms() const {
    Terms<T> terms;
    if (arrives) terms.add(args.g, weights + layers * planes);
    for (std::size_t j = 0; j < args.later_grads.size(); ++j)
      terms.add(args.later_grads[j], small(args.later_weights[j]));
    if (args.grad_v != nullptr) terms.add(args.grad_v, nullptr);
    return terms;
  }

  void value_gradients() const {
    const Terms<T> terms = value_terms();
    ValueGradient<T> in{nullptr, map(args.x), args.residual ? map(args.grad_out) : nullptr, nullptr,
                        small(args.v_weight), small(args.grad_pooled_v), dy};
    if (terms.count == 1) {
      in.dv = terms.maps[0];
      in.weight = terms.weights[0];
    } else if (terms.count > 1) {
      const std::vector<const void*> read(terms.maps, terms.maps + terms.count);
      const Cut cut = this->cut_maps(joined(read, {args.dv}));
      launch(call, sum_kernel<T>, {cut.blocks, kThreads}, cut, terms, map(args.dv));
      in.dv = map(args.dv);
    }
    with_format(args.channels_last, [&](auto last) {
      launch(call, value_gradients_kernel<T, last.value>, tile_grid(tiles, tile_bytes), tiles, in,
             map(args.dx), taps);
    });
    launch(call, weight_gradients_kernel<A>, channel_grid(args.channels, kTaps),
           args.batch * tiles.pieces(), args.channels, taps, small(args.dv_weight), nullptr,
           nullptr);
  }

  void run() const {
    this->recall(state, recalled);
    this->weigh(small(args.scores), recalled.gates, weights);
    if (arrives) branch_gradients();
    memory_gradients();
    value_gradients();
  }
};

}  // namespace
}  // namespace base

void base_attention_forward(const BaseAttentionForward& args) {
  with_element_type(args.dtype, [&](auto element) {
    base::ForwardStep<decltype(element)>(args).run();
  });
}

void base_attention_backward(const BaseAttentionBackward& args) {
  with_element_type(args.dtype, [&](auto element) {
    base::BackwardStep<decltype(element)>(args).run();
  });
}

std::int64_t base_attention_forward_scratch(const BaseAttentionForward& args) {
  return scratch_of<base::ForwardStep>(args);
}
std::int64_t base_attention_backward_scratch(const BaseAttentionBackward& args) {
  return scratch_of<base::BackwardStep>(args);
}

}  // namespace dla::cuda
