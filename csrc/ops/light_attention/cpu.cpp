#include "ops/light_attention/op.h"

#include "common/branch_norm.h"
#include "common/moments.h"
#include "common/scratch.h"
#include "common/vmath.h"
#include "ops/cell/cell.h"
#include "ops/global_pool/op.h"
#include "ops/light_attention/passes.h"
#include "ops/light_attention/scores.h"

namespace dla::DLA_ISA {
namespace {

// What the step computes per plane, arrays [B, C]; see SummaryField.
template <class A>
struct Summary {
  A* data;
  int64_t planes;
  A *y, *mean_p, *a, *d;

  Summary(A* data, int64_t planes)
      : data(data),
        planes(planes),
        y(of(kMeanX)),
        mean_p(of(kMeanP)),
        a(of(kAttention)),
        d(of(kGate)) {}
  A* of(int field) const { return data + field * planes; }
};

template <class A>
struct Step {
  const LightAttentionInputs& args;
  MapShape shape;
  Grid<A> grid;
  Units<A> units;
  FilterBank<A> v_filters, prev_filters;
  int64_t planes;
  CellWeights<A> cell;

  explicit Step(const LightAttentionInputs& args)
      : args(args),
        shape{args.batch, args.channels, args.height, args.width, args.channels_last},
        grid(shape),
        units(args.branch_norm == Norm::none ? Units<A>(grid)
                                             : Units<A>::of_whole_batches(grid)),
        v_filters(as<A>(args.v_weight), grid),
        prev_filters(as<A>(args.prev_weight), grid),
        planes(shape.planes()),
        cell{args.cell, args.activation, args.channels, args.hidden, {}} {
    for (std::size_t i = 0; i < args.cell_params.size(); ++i)
      cell.params[i] = as<A>(args.cell_params[i]);
  }

  Feature feature(const void* p) const { return {p, args.dtype}; }
  OutFeature written_once(void* p) const {
    return dla::DLA_ISA::written_once(p, args.dtype, shape);
  }

  bool dynamic() const { return !args.cell_params.empty(); }
  int64_t slots() const { return dynamic() ? cell_slots(cell.kind) : 0; }
  bool gated() const { return dynamic() && args.p != nullptr; }
  double drop_scale(int64_t b) const {
    return args.drop_scale == nullptr ? 1.0 : static_cast<double>(as<A>(args.drop_scale)[b]);
  }
  Doubles norm_weight(const ChannelLanes& c) const {
    return args.norm_weight == nullptr ? splat(1.0) : c.load(as<A>(args.norm_weight));
  }
  Doubles norm_bias(const ChannelLanes& c) const {
    return args.norm_bias == nullptr ? Doubles{} : c.load(as<A>(args.norm_bias));
  }
  Doubles mean(const void* means, const ChannelLanes& c) const {
    return args.norm == Norm::none ? Doubles{} : c.load(as<A>(means));
  }
  Doubles rstd(const void* vars, const ChannelLanes& c) const {
    if (args.norm == Norm::none) return splat(1.0);
    return 1.0 / square_root(c.load(as<A>(vars)) + args.eps);
  }
  ScoreWeights<A> scores() const {
    return {{as<A>(args.q_weight), args.kernel_size, args.channels},
            {as<A>(args.k_weight), args.kernel_size, args.channels},
            args.head_dim};
  }
  Mixture<A> mixture(const A* a, const A* d) const {
    return {v_filters.data(), prev_filters.data(), a, d, as<A>(args.lam)};
  }
  BranchNorm<A> branch_norm() const {
    return {as<A>(args.branch_weight), as<A>(args.branch_bias), args.branch_eps};
  }
  // `coefficients` [2, C] is working memory, for scale and shift of the branch.
  InputMap<A> x(A* coefficients) const {
    const bool normed = args.branch_norm != Norm::none;
    return {feature(args.x), args.join, normed ? coefficients : nullptr,
            normed ? coefficients + shape.channels : nullptr};
  }
  void branch_coefficients(const void* mean, const void* var, A* to) const {
    for_channels([&](const ChannelLanes& c) {
      branch_norm().coefficients(c, as<A>(mean), as<A>(var), to, to + shape.channels);
    });
  }
  // A function of a field that gives a plane's numbers of some channels.
  static auto fields_of(PlaneTable<A> table, int64_t b, const ChannelLanes& c) {
    // The table has whole vectors of channels.
    return [record = table.record(b, c.first)](int field) {
      return ChannelLanes{field * PlaneTable<A>::kPlanes, kLanes<double>}.load(record);
    };
  }
  auto mixture_of_planes(const Summary<const A>& summary, int64_t b, const ChannelLanes& c) const {
    const int64_t row = b * shape.channels;
    return MixtureOfO<Doubles>(c.load(summary.a + row), c.load(summary.d + row),
                               c.load(as<A>(args.lam)));
  }

  template <class Body>
  void for_channels(const Body& body) const {
    dla::DLA_ISA::for_channels(args.threads, shape.channels, body);
  }

  // values[i] = function(values[i]) for an array [B, C].
  template <class Function>
  void transform(A* values, const Function& function) const {
    parallel_for(args.threads, shape.batch, [&](int64_t b) {
      A* row = values + b * shape.channels;
      for (int64_t c = 0; c < shape.channels; c += kLanes<A>) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes<A>, shape.channels - c));
        store_n(row + c, function(load_n(row + c, n)), n);
      }
    });
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <class A>
struct ForwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes;

  const LightAttentionForward& args;
  const int64_t whole_batch;  // that state, new_state and summary are of; shape.batch or more
  const bool row_by_row;      // how the cell is evaluated, see CellInputs
  const bool fetches_next;    // whether more samples follow, likely from memory

  ForwardStep(const LightAttentionForward& args, int64_t whole_batch, bool row_by_row,
              bool fetches_next)
      : Step<A>(args),
        args(args),
        whole_batch(whole_batch),
        row_by_row(row_by_row),
        fetches_next(fetches_next) {}

  // What the planes of o of one sample are, in some channels.
  auto plane(PlaneTable<A> table, const Summary<const A>& summary, int64_t b,
             const ChannelLanes& c) const {
    return PlaneOfO(this->fields_of(table, b, c), static_cast<double>(shape.pixels()),
                    this->mixture_of_planes(summary, b, c));
  }

  // Mean and variance of o over batch and space; and what the backward step wants to know of planes.
  void statistics(PlaneTable<A> table, const Summary<A>& to, const ChannelLanes& c) const {
    const Summary<const A> summary(to.data, planes);
    RunningMoments moments;
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t row = b * shape.channels;
      const auto plane = this->plane(table, summary, b, c);
      const Doubles variance = plane.for_maps([&](int f, Doubles mean, Doubles covariance) {
        A* const rounded = to.of(mean_of_map(f)) + row;
        c.store(rounded, mean);
        c.store(to.of(kRestU + f) + row, mean - c.load(rounded));
        c.store(to.of(kCovarianceU + f) + row, covariance);
      });
      moments.add(plane.mean(), variance * plane.pixels, plane.pixels);
    }
    c.store(as<A>(args.mean), moments.mean());
    c.store(as<A>(args.var), moments.variance());
  }

  void pool(const InputMap<A>& x, const Summary<A>& to) const {
    if (args.join)
      return run_pass<JoinedMeansPass>(args.threads, grid, x, this->feature(args.p), to.y,
                                       this->gated() ? to.mean_p : nullptr);
    GlobalPoolForward pooling{args.x,     to.y,  shape.batch, shape.channels, shape.pixels(),
                              args.dtype, shape.channels_last, args.threads};
    global_pool_forward(pooling);
    if (!this->gated()) return;
    pooling.x = args.p;
    pooling.out = to.mean_p;
    global_pool_forward(pooling);
  }

  void pool_from_sums(PlaneTable<A> table, int64_t b, const Summary<A>& to) const {
    const A scale = A(1) / static_cast<A>(shape.pixels());
    for (int64_t c = 0; c < shape.channels; c += kLanes<A>) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes<A>, shape.channels - c));
      const int64_t i = b * shape.channels + c;
      const auto field = [&](int f) { return load(table.record(b, c) + f * kLanes<A>); };
      store_n(to.y + i, field(kX) * scale, n);
      if (this->gated()) store_n(to.mean_p + i, field(kShiftP) + field(kP) * scale, n);
    }
  }

  // Pooled values, from the table if there is one, and scores.
  void pool_and_score(const PlaneTable<A>* table, const InputMap<A>& x,
                      const Summary<A>& to) const {
    if (table == nullptr) pool(x, to);
    parallel_for(args.threads, shape.batch, [&](int64_t b) {
      thread_local Scratch scratch;
      if (table != nullptr) pool_from_sums(*table, b, to);
      const int64_t row = b * shape.channels;
      this->scores().forward(to.y + row, to.a + row, scratch);
    });
  }

  // New state and gates.
  void evaluate_cell(const Summary<A>& to) const {
    A* new_state = as<A>(args.new_state);
    if (this->dynamic())
      cell_forward<A>(this->cell,
                      {to.y, as<A>(args.state), shape.batch, false, whole_batch, row_by_row},
                      new_state, false, args.threads);
    if (!this->gated()) {
      std::fill_n(to.mean_p, planes, A(0));
      std::fill_n(to.d, planes, A(1));
      return;
    }
    cell_forward<A>(this->cell,
                    {to.mean_p, new_state, shape.batch, args.first_sample, whole_batch,
                     row_by_row},
                    to.d, true, args.threads);
    if (args.sigmoid_gate) this->transform(to.d, [](Vec<A> v) { return sigmoid<A>(v); });
  }

  // Coefficients of the branch's norm. Statistics of the batch may be left to a pass that works unit by
  // unit: what it needs for that is returned.
  BranchStatistics<A> prepare_branch(A* coefficients, A* sums, bool leave) const {
    const BranchStatistics<A> statistics{grid,
                                         this->feature(args.x),
                                         this->branch_norm(),
                                         as<A>(args.branch_mean),
                                         as<A>(args.branch_var),
                                         coefficients,
                                         coefficients + shape.channels,
                                         sums};
    if (args.branch_norm == Norm::running)
      this->branch_coefficients(args.branch_mean_in, args.branch_var_in, coefficients);
    if (args.branch_norm != Norm::batch || leave) return statistics;
    with_lanes(grid, [&](auto fixed) {
      parallel_for(args.threads, this->units.count(), [&](int64_t unit) {
        statistics.template add_planes<fixed>(this->units, unit);
      });
    });
    this->for_channels([&](const ChannelLanes& c) { statistics.combine(c); });
    return statistics;
  }

  // out = [x] + scale o + shift.
  void output_coefficients(const ChannelLanes& c, A* scale, A* shift) const {
    const bool running = args.norm == Norm::running;
    const void *means = running ? args.mean_in : args.mean, *vars = running ? args.var_in : args.var;
    const Doubles weight = this->norm_weight(c) * this->rstd(vars, c);
    const Doubles bias = this->norm_bias(c) - weight * this->mean(means, c);
    for (int64_t b = 0; b < shape.batch; ++b) {
      c.store(scale + b * shape.channels, this->drop_scale(b) * weight);
      c.store(shift + b * shape.channels, this->drop_scale(b) * bias);
    }
  }

  void run() const {
    const bool batch_norm = args.norm == Norm::batch;
    const bool branch_of_batch = args.branch_norm == Norm::batch;
    const int64_t table_size = batch_norm ? PlaneTable<A>::elements(shape, kPlaneFields) : 0;
    const int64_t branch_size = branch_of_batch ? BranchStatistics<A>::elements(shape) : 0;
    Buffers<A> buffers(table_size + branch_size + 2 * shape.channels + 2 * planes);
    const PlaneTable<A> table(buffers.take(table_size), shape, kPlaneFields);
    A* branch_sums = buffers.take(branch_size);
    A* branch_coefficients = buffers.take(2 * shape.channels);
    A *scale = buffers.take(planes), *shift = buffers.take(planes);
    const Summary<A> summary(as<A>(args.summary), whole_batch * shape.channels);
    const InputMap<A> x = this->x(branch_coefficients);
    const bool in_moments = branch_of_batch && batch_norm && this->units.have_whole_batches();
    const auto branch = prepare_branch(branch_coefficients, branch_sums, in_moments);
    if (batch_norm)
      run_pass<MomentsPass>(args.threads, grid, x, this->feature(args.p), Feature{}, Feature{},
                            this->v_filters.data(), this->prev_filters.data(), PlaneMeans<A>{},
                            table, this->units, in_moments ? &branch : nullptr);
    pool_and_score(batch_norm ? &table : nullptr, x, summary);
    evaluate_cell(summary);
    this->for_channels([&](const ChannelLanes& c) {
      if (batch_norm) statistics(table, summary, c);
      output_coefficients(c, scale, shift);
    });
    run_pass<StencilPass>(args.threads, grid, x, this->feature(args.p),
                          this->written_once(args.out), this->written_once(args.o),
                          this->mixture(summary.a, summary.d), scale, shift, args.residual,
                          fetches_next ? planes * shape.pixels() : 0);
  }
};

// Bytes of a map of one sample, and of its x and p.
int64_t map_bytes(const LightAttentionForward& args) {
  return args.channels * args.height * args.width * element_size(args.dtype);
}
int64_t sample_bytes(const LightAttentionForward& args) {
  return (args.p == nullptr ? 1 : 2) * map_bytes(args);
}

// Whether samples have nothing in common but parameters.
bool are_apart(const LightAttentionForward& args) {
  return args.norm != Norm::batch && args.branch_norm != Norm::batch && !args.first_sample;
}

// Samples that a step takes at a time, so that the maps that were read for pooling are in the cache when
// they are read again.
int64_t samples_at_a_time(const LightAttentionForward& args) {
  const int64_t most_bytes = int64_t{args.threads} << 22;  // caches that are shared grow with the cores
  if (!are_apart(args)) return args.batch;
  return std::clamp<int64_t>(most_bytes / sample_bytes(args), 1, args.batch);
}

// `count` samples of a step from `first` on.
template <class A>
LightAttentionForward samples(LightAttentionForward args, int64_t first, int64_t count) {
  const int64_t row = first * args.channels * static_cast<int64_t>(sizeof(A));
  const int64_t map = first * map_bytes(args);
  args.batch = count;
  const auto advance = [](auto& array, int64_t bytes) {
    if (array != nullptr) array = as<char>(array) + bytes;
  };
  advance(args.x, map), advance(args.p, map), advance(args.out, map), advance(args.o, map);
  advance(args.state, row), advance(args.new_state, row), advance(args.summary, row);
  advance(args.drop_scale, first * static_cast<int64_t>(sizeof(A)));
  return args;
}

// ---- backward ----------------------------------------------------------------------------------

template <class A>
struct BackwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes;

  const LightAttentionBackward& args;
  const Summary<const A> summary;

  explicit BackwardStep(const LightAttentionBackward& args)
      : Step<A>(args), args(args), summary(as<A>(args.summary), planes) {}

  struct Coefficients {
    A *out_scale;         // [B, C]
    A *o_scale, *offset;  // [C]
  };

  // What the planes of g = dL/do of one sample are, in some channels.
  auto plane(PlaneTable<A> table, int64_t b, const ChannelLanes& c) const {
    const auto kept = [this, c, row = b * shape.channels](int field) {
      return c.load(summary.of(field) + row);
    };
    return PlaneOfGradient(this->fields_of(table, b, c), kept,
                           static_cast<double>(shape.pixels()),
                           this->mixture_of_planes(summary, b, c));
  }

  // Mean of o over batch and space. Not the one that was rounded to A: it is multiplied by sums of
  // gradients over whole planes, which may be large.
  Doubles mean_of_o(PlaneTable<A> table, const ChannelLanes& c) const {
    Doubles sum{};
    for (int64_t b = 0; b < shape.batch; ++b) sum += plane(table, b, c).mean();
    return sum / static_cast<double>(shape.batch);
  }

  // Coefficients of g, and the gradients of the norm's weight and bias, of lam, of the scores and of
  // the cell's output.
  template <bool batch_norm>
  void channel_gradients(PlaneTable<A> table, const ChannelLanes& c, const Coefficients& to, A* da,
                         A* dd) const {
    const Doubles rstd = this->rstd(args.var, c);
    GradientOfO<Doubles> g{this->norm_weight(c) * rstd,
                           batch_norm ? mean_of_o(table, c) : this->mean(args.mean, c)};
    Doubles dweight{}, dbias{}, dlam{};
    for (int64_t b = 0; b < shape.batch; ++b) {
      const auto plane = this->plane(table, b, c);
      dweight += this->drop_scale(b) * plane.with_out(g.mean);
      dbias += this->drop_scale(b) * plane.at(kG);
    }
    dweight *= rstd;
    const double count = static_cast<double>(shape.batch * shape.pixels());
    if (batch_norm) g.pass_norm(rstd, dweight, dbias, count);
    c.store(to.o_scale, g.slope);
    c.store(to.offset, g.level - g.slope * g.mean);
    const Doubles lam = c.load(as<A>(args.lam));
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t row = b * shape.channels;
      const Doubles out_scale = g.weight * this->drop_scale(b), d = c.load(summary.d + row);
      const auto [gu, gp, ge] = plane(table, b, c).template with_g<batch_norm>(g, out_scale);
      c.store(to.out_scale + row, out_scale);
      c.store(da + row, gu);
      c.store(dd + row, args.sigmoid_gate ? lam * gp * d * (1.0 - d) : lam * gp);
      dlam += d * gp + ge;
    }
    if (args.dnorm_weight != nullptr) c.store(as<A>(args.dnorm_weight), dweight);
    if (args.dnorm_bias != nullptr) c.store(as<A>(args.dnorm_bias), dbias);
    c.store(as<A>(args.dlam), dlam);
  }

  // From da: dy, and the gradients of the two channel filters; sums [B, 2, taps] is working memory.
  void score_gradients(const A* da, A* dy, A* sums) const {
    const int64_t taps = args.kernel_size, channels = shape.channels;
    parallel_for(args.threads, shape.batch, [&](int64_t b) {
      thread_local Scratch scratch;
      const int64_t row = b * channels;
      A* to = sums + 2 * taps * b;
      this->scores().backward(summary.y + row, summary.a + row, da + row, dy + row, to, to + taps,
                              scratch);
    });
    for (int64_t t = 0; t < 2 * taps; ++t) {
      double total = 0;
      for (int64_t b = 0; b < shape.batch; ++b) total += sums[2 * taps * b + t];
      as<A>(t < taps ? args.dq_weight : args.dk_weight)[t % taps] = static_cast<A>(total);
    }
  }

  // Backward of the two cell evaluations: the gate's, then the step's own. grad_state is that of
  // the new state and collects the gate's share.
  void cell_gradients(const A* dd, A* dy, A* dpooled_p, A* grad_state) const {
    A* dparams[kMaxCellParams] = {};
    for (std::size_t i = 0; i < args.dcell_params.size(); ++i) {
      dparams[i] = as<A>(args.dcell_params[i]);
    }
    if (this->gated())
      cell_backward<A>(this->cell,
                       {summary.mean_p, as<A>(args.new_state), shape.batch, args.first_sample},
                       dd, true, dpooled_p, grad_state, dparams, true, args.threads);
    A* dstate = as<A>(args.dstate);
    std::fill_n(dstate, this->slots() * planes, A(0));
    cell_backward<A>(this->cell, {summary.y, as<A>(args.state), shape.batch}, grad_state, false, dy,
                     dstate, dparams, !this->gated(), args.threads);
  }

  void weight_gradients(const A* partial, int64_t batch_units, const ChannelLanes& c) const {
    for (int64_t tap = 0; tap < 18; ++tap) {
      Doubles total{};
      for (int64_t unit = 0; unit < batch_units; ++unit)
        total += c.load(partial + (unit * 18 + tap) * shape.channels);
      if (tap >= 9) total *= c.load(as<A>(args.lam));
      A* to = as<A>(tap < 9 ? args.dv_weight : args.dprev_weight);
      if (to == nullptr) return;
      for (int i = 0; i < c.count; ++i)
        to[(c.first + i) * 9 + tap % 9] = static_cast<A>(total[i]);
    }
  }

  // What remains of the branch's gradient where it was not done unit by unit.
  void finish(const BranchGradients<A>& branch) const {
    this->for_channels([&](const ChannelLanes& c) { branch.combine(c); });
    with_lanes(grid, [&](auto fixed) {
      parallel_for(args.threads, this->units.count(),
                   [&](int64_t unit) { branch.template write<fixed>(this->units, unit); });
    });
  }

  void run() const {
    const int64_t channels = shape.channels, slots = this->slots();
    const Units<A>& units = this->units;
    const bool branch_normed = args.branch_norm != Norm::none;
    const int64_t branch_size = branch_normed ? BranchGradients<A>::elements(shape) : 0;
    const int64_t partial_size = units.batch_units * 18 * channels;
    const int64_t table_size = PlaneTable<A>::elements(shape, kGradientFields);
    const int64_t filter_sums = 2 * args.kernel_size * shape.batch;
    Buffers<A> buffers(table_size + branch_size + (5 + slots) * planes + partial_size +
                       4 * channels + filter_sums);
    const PlaneTable<A> table(buffers.take(table_size), shape, kGradientFields);
    A *da = buffers.take(planes), *dd = buffers.take(planes), *out_scale = buffers.take(planes);
    A *dy = buffers.take(planes), *dpooled_p = buffers.take(planes);
    A *grad_state = buffers.take(slots * planes), *partial = buffers.take(partial_size);
    const Coefficients to{out_scale, buffers.take(channels), buffers.take(channels)};
    A *branch_coefficients = buffers.take(2 * channels), *branch_sums = buffers.take(branch_size);
    const InputMap<A> x = this->x(branch_coefficients);
    if (branch_normed)
      this->branch_coefficients(args.branch_mean, args.branch_var, branch_coefficients);
    const BranchGradients<A> branch{grid,
                                    this->feature(args.x),
                                    this->written_once(args.dx),
                                    this->branch_norm(),
                                    args.branch_norm == Norm::batch,
                                    as<A>(args.branch_mean),
                                    as<A>(args.branch_var),
                                    as<A>(args.dbranch_weight),
                                    as<A>(args.dbranch_bias),
                                    branch_sums,
                                    branch_sums + 2 * planes};

    const bool through_norm = args.norm == Norm::batch;
    PlaneMeans<A> means{summary.y, this->gated() ? summary.mean_p : nullptr, nullptr, false};
    if (through_norm)
      means = {summary.of(kMeanU), summary.mean_p, summary.of(kMeanE), true};
    run_pass<GradientSumsPass>(args.threads, grid, x, this->feature(args.p),
                               this->feature(args.grad_out), this->feature(args.grad_o),
                               this->v_filters.data(), this->prev_filters.data(), means, table,
                               units, nullptr);
    this->for_channels([&](const ChannelLanes& c) {
      through_norm ? channel_gradients<true>(table, c, to, da, dd)
                   : channel_gradients<false>(table, c, to, da, dd);
    });
    score_gradients(da, dy, buffers.take(filter_sums));
    std::fill_n(dpooled_p, planes, A(0));
    if (this->dynamic()) {
      if (args.grad_state != nullptr)
        std::copy_n(as<A>(args.grad_state), slots * planes, grad_state);
      else
        std::fill_n(grad_state, slots * planes, A(0));
      cell_gradients(dd, dy, dpooled_p, grad_state);
    }
    const auto per_pixel = [pixels = static_cast<A>(shape.pixels())](Vec<A> v) { return v / pixels; };
    this->transform(dy, per_pixel);
    this->transform(dpooled_p, per_pixel);

    // Of a joined x it is read again, for dp and by the branch's norm.
    const OutFeature dx =
        args.join ? OutFeature{{args.dx, args.dtype}} : this->written_once(args.dx);
    run_pass<GradientsPass>(
        args.threads, grid, x, this->feature(args.p), this->feature(args.grad_out),
        this->feature(args.grad_o), dx, this->written_once(args.dp),
        this->mixture(summary.a, summary.d), out_scale, through_norm ? to.o_scale : nullptr,
        through_norm ? to.offset : nullptr, dy, dpooled_p, args.residual, partial, units,
        branch_normed ? &branch : nullptr);
    if (branch_normed && !units.have_whole_batches()) finish(branch);
    this->for_channels(
        [&](const ChannelLanes& c) { weight_gradients(partial, units.batch_units, c); });
  }
};

}  // namespace

void light_attention_forward(const LightAttentionForward& args) {
  with_compute_type(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    const int64_t step = samples_at_a_time(args);
    // Of large samples few come at a time. Not told by `step`, which depends on the threads.
    const bool row_by_row = are_apart(args) && sample_bytes(args) > 1 << 20;
    for (int64_t first = 0; first < args.batch; first += step) {
      const int64_t count = std::min(step, args.batch - first);
      const LightAttentionForward part = samples<A>(args, first, count);
      ForwardStep<A>(part, args.batch, row_by_row, first + count < args.batch).run();
    }
  });
}

void light_attention_backward(const LightAttentionBackward& args) {
  with_compute_type(args.dtype, [&](auto zero) { BackwardStep<decltype(zero)>(args).run(); });
}

}  // namespace dla::DLA_ISA
