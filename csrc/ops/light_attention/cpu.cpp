#include "ops/light_attention/op.h"

#include "ops/cell/cell.h"
#include "ops/cell/layout.h"
#include "ops/global_pool/op.h"
#include "ops/light_attention/scores.h"

namespace dla::DLA_ISA {
namespace {

constexpr int64_t kChannelBlock = 32;  // channels of one task of the per-channel loops

template <class A>
struct Step {
  const LightAttentionInputs& args;
  MapShape shape;
  Grid<A> grid;
  int64_t planes;
  CellWeights<A> cell;

  explicit Step(const LightAttentionInputs& args)
      : args(args),
        shape{args.batch, args.channels, args.height, args.width, args.channels_last},
        grid(shape),
        planes(shape.planes()),
        cell{static_cast<CellKind>(args.cell), static_cast<Activation>(args.activation),
             args.channels, args.hidden, {}} {
    for (std::size_t i = 0; i < args.cell_params.size(); ++i)
      cell.params[i] = small(args.cell_params[i]);
  }

  static const A* small(const void* p) { return static_cast<const A*>(p); }
  static A* small(void* p) { return static_cast<A*>(p); }
  Feature feature(const void* p) const { return {p, args.dtype}; }
  OutFeature feature(void* p) const { return {p, args.dtype}; }

  bool dynamic() const { return !args.cell_params.empty(); }
  int64_t slots() const {
    return dynamic() ? with_tail(cell.kind, [](auto tail) -> int64_t { return tail.slots; }) : 0;
  }
  bool gated() const { return dynamic() && args.p != nullptr; }
  double drop_scale(int64_t b) const {
    return args.drop_scale == nullptr ? 1.0 : static_cast<double>(small(args.drop_scale)[b]);
  }
  double norm_weight(int64_t c) const {
    return args.norm_weight == nullptr ? 1.0 : static_cast<double>(small(args.norm_weight)[c]);
  }
  double norm_bias(int64_t c) const {
    return args.norm_bias == nullptr ? 0.0 : static_cast<double>(small(args.norm_bias)[c]);
  }
  double mean(const void* means, int64_t c) const {
    return args.norm == Norm::none ? 0.0 : static_cast<double>(small(means)[c]);
  }
  double rstd(const void* vars, int64_t c) const {
    if (args.norm == Norm::none) return 1.0;
    return 1.0 / std::sqrt(static_cast<double>(small(vars)[c]) + args.eps);
  }
  ScoreWeights<A> scores() const {
    return {small(args.q_weight), small(args.k_weight), args.kernel_size, args.channels,
            args.head_dim};
  }
  Mixture<A> mixture(const A* a, const A* d) const {
    return {small(args.v_weight), small(args.prev_weight), a, d, small(args.lam)};
  }
  void moments(PlaneTable<A> table, const void* grad_out, const void* grad_o, void* joined) const {
    run_pass<MomentsPass>(args.threads, grid, feature(args.x), feature(args.p), feature(grad_out),
                          feature(grad_o), feature(joined), small(args.v_weight),
                          small(args.prev_weight), table);
  }
  PlaneStatistics statistics(PlaneTable<A> table, const A* a, const A* d, int64_t b,
                             int64_t c) const {
    const int64_t plane = b * shape.channels + c;
    return {table, b, c, static_cast<double>(shape.pixels()), a[plane],
            d == nullptr ? A(1) : d[plane], small(args.lam)[c]};
  }

  template <class Body>
  void for_channels(const Body& body) const {
    parallel_for(args.threads, ceil_div(shape.channels, kChannelBlock), [&](int64_t block) {
      const int64_t first = block * kChannelBlock;
      body(first, std::min(shape.channels, first + kChannelBlock));
    });
  }

  // New state, attention and gate from the pooled values. The second loop starts when the first
  // has ended: with first_sample every gate reads the new state of row 0.
  void attend(const A* y, const A* pooled_p, A* state_out, A* a, A* d) const {
    const int64_t rows = kLanes<A>, tasks = ceil_div(shape.batch, rows), channels = shape.channels;
    parallel_for(args.threads, tasks, [&](int64_t task) {
      thread_local Scratch scratch, lines;
      const int64_t first = task * rows, last = std::min(shape.batch, first + rows);
      if (dynamic())
        cell_forward_rows<A>(cell, y, small(args.state), false, shape.batch, first, last, state_out,
                             false, scratch);
      A* query = lines.template reserve<A>(2 * channels);
      for (int64_t b = first; b < last; ++b)
        scores().forward(y + b * channels, query, query + channels, a + b * channels);
    });
    if (!gated()) return;
    parallel_for(args.threads, tasks, [&](int64_t task) {
      thread_local Scratch scratch;
      const int64_t first = task * rows, last = std::min(shape.batch, first + rows);
      cell_forward_rows<A>(cell, pooled_p, state_out, args.first_sample, shape.batch, first, last,
                           d, true, scratch);
      if (!args.sigmoid_gate) return;
      for (int64_t i = first * channels; i < last * channels; ++i)
        d[i] = A(1) / (A(1) + std::exp(-d[i]));
    });
  }
};

// ---- forward -----------------------------------------------------------------------------------

template <class A>
struct ForwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes, Step<A>::small;

  const LightAttentionForward& args;

  explicit ForwardStep(const LightAttentionForward& args) : Step<A>(args), args(args) {}

  // What attention sees.
  const void* x() const { return args.joined != nullptr ? args.joined : args.x; }

  void pool(A* y, A* pooled_p) const {
    if (args.joined != nullptr)
      run_pass<JoinPass>(args.threads, this->grid, this->feature(args.x), this->feature(args.p),
                         this->feature(args.joined));
    GlobalPoolForward pooling{x(),        y,          shape.batch, shape.channels, shape.pixels(),
                              args.dtype, shape.channels_last, args.threads};
    global_pool_forward(pooling);
    if (!this->gated()) return;
    pooling.x = args.p;
    pooling.out = pooled_p;
    global_pool_forward(pooling);
  }

  void pool_from_sums(PlaneTable<A> table, A* y, A* pooled_p) const {
    const A scale = A(1) / static_cast<A>(shape.pixels());
    for (int64_t b = 0; b < shape.batch; ++b) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t i = b * shape.channels + c;
        y[i] = table.at(kX, b, c) * scale;
        if (this->gated()) pooled_p[i] = table.at(kShiftP, b, c) + table.at(kP, b, c) * scale;
      }
    }
  }

  // Mean and biased variance of o over batch and space, by Chan's rule over the planes.
  void batch_statistics(PlaneTable<A> table, const A* a, const A* d, A* mean, A* var) const {
    this->for_channels([&](int64_t first, int64_t last) {
      const double pixels = static_cast<double>(shape.pixels());
      for (int64_t c = first; c < last; ++c) {
        double count = 0, centre = 0, square = 0;
        for (int64_t b = 0; b < shape.batch; ++b) {
          const PlaneStatistics plane = this->statistics(table, a, d, b, c);
          const double delta = plane.shift() + plane.sum() / pixels - centre;
          count += pixels;
          centre += delta * (pixels / count);
          square += plane.centred_square() + delta * delta * pixels * (count - pixels) / count;
        }
        mean[c] = static_cast<A>(centre);
        var[c] = static_cast<A>(square / count);
      }
    });
  }

  // out = [x] + scale o + shift.
  void output_coefficients(A* scale, A* shift) const {
    const bool running = args.norm == Norm::running;
    const void *means = running ? args.mean_in : args.mean, *vars = running ? args.var_in : args.var;
    this->for_channels([&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const double weight = this->norm_weight(c) * this->rstd(vars, c);
        const double bias = this->norm_bias(c) - weight * this->mean(means, c);
        for (int64_t b = 0; b < shape.batch; ++b) {
          scale[b * shape.channels + c] = static_cast<A>(this->drop_scale(b) * weight);
          shift[b * shape.channels + c] = static_cast<A>(this->drop_scale(b) * bias);
        }
      }
    });
  }

  void run() const {
    const bool batch_norm = args.norm == Norm::batch;
    const int64_t table_size = batch_norm ? PlaneTable<A>::elements(shape) : 0;
    Buffers<A> buffers(4 * planes + table_size);
    A *a = buffers.take(planes), *d = buffers.take(planes);
    A *scale = buffers.take(planes), *shift = buffers.take(planes);
    A *y = small(args.pooled), *pooled_p = y + planes;
    if (!this->gated()) {
      d = nullptr;
      std::fill_n(pooled_p, planes, A(0));
    }
    const PlaneTable<A> table(buffers.take(table_size), shape);
    if (batch_norm) {
      this->moments(table, nullptr, nullptr, args.joined);
      pool_from_sums(table, y, pooled_p);
    } else {
      pool(y, pooled_p);
    }
    this->attend(y, pooled_p, small(args.state_out), a, d);
    if (batch_norm) batch_statistics(table, a, d, small(args.mean), small(args.var));
    output_coefficients(scale, shift);
    run_pass<StencilPass>(args.threads, this->grid, this->feature(x()), this->feature(args.p),
                          this->feature(args.out), this->feature(args.o), this->mixture(a, d), scale,
                          shift, args.residual);
  }
};

// ---- backward ----------------------------------------------------------------------------------

template <class A>
struct BackwardStep : Step<A> {
  using Step<A>::shape, Step<A>::grid, Step<A>::planes, Step<A>::small;

  const LightAttentionBackward& args;

  explicit BackwardStep(const LightAttentionBackward& args) : Step<A>(args), args(args) {}

  // o - mean of a plane has shift kappa against the plane's shifted sums.
  double kappa(const PlaneStatistics& plane, int64_t c) const {
    return plane.shift() - this->mean(args.mean, c);
  }

  struct Coefficients {
    A *out_scale;         // [B, C]
    A *o_scale, *offset;  // [C]
  };

  // g = out_scale G + o_scale (o - mean) + rest + grad_o; the offset is rest - o_scale mean.
  // Also the gradients of the norm's weight and bias, of lam, of the scores and of the gate.
  void channel_gradients(PlaneTable<A> table, const A* a, const A* d, const Coefficients& to, A* da,
                         A* dd) const {
    this->for_channels([&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) one_channel(table, a, d, to, da, dd, c);
    });
  }

  void one_channel(PlaneTable<A> table, const A* a, const A* d, const Coefficients& to, A* da,
                   A* dd, int64_t c) const {
    const double pixels = static_cast<double>(shape.pixels());
    const double rstd = this->rstd(args.var, c), weight = this->norm_weight(c) * rstd;
    double dweight = 0, dbias = 0, dlam = 0;
    for (int64_t b = 0; b < shape.batch; ++b) {
      const PlaneStatistics plane = this->statistics(table, a, d, b, c);
      const double sum = table.at(kG, b, c);
      const double with_o = plane.mix(table.at(kGU, b, c), table.at(kGP, b, c), table.at(kGE, b, c)) +
                            kappa(plane, c) * sum;
      dweight += this->drop_scale(b) * with_o;
      dbias += this->drop_scale(b) * sum;
    }
    dweight *= rstd;
    const bool batch_norm = args.norm == Norm::batch;
    const double count = pixels * static_cast<double>(shape.batch);
    const double o_scale = batch_norm ? -weight * rstd * dweight / count : 0.0;
    const double rest = batch_norm ? -weight * dbias / count : 0.0;
    to.o_scale[c] = static_cast<A>(o_scale);
    to.offset[c] = static_cast<A>(rest - o_scale * this->mean(args.mean, c));
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t i = b * shape.channels + c;
      const PlaneStatistics s = this->statistics(table, a, d, b, c);
      const double out_scale = weight * this->drop_scale(b), k = kappa(s, c);
      // Sum over the plane of g f for f = u, p, e: from the products of f with G, o, 1 and grad_o.
      const double g = out_scale * table.at(kG, b, c) + o_scale * (s.sum() + k * pixels) +
                       rest * pixels + table.at(kD, b, c);
      const auto product = [&](double with_g, double with_o, double alone, double with_d,
                               double shift) {
        return out_scale * with_g + o_scale * (with_o + k * alone) + rest * alone + with_d +
               shift * g;
      };
      const double gu = product(table.at(kGU, b, c), s.mix(s.uu, s.up, s.ue), s.u,
                                table.at(kDU, b, c), s.shift_u);
      const double gp = product(table.at(kGP, b, c), s.mix(s.up, s.pp, s.pe), s.p,
                                table.at(kDP, b, c), s.shift_p);
      const double ge = product(table.at(kGE, b, c), s.mix(s.ue, s.pe, s.ee), s.e,
                                table.at(kDE, b, c), s.shift_e);
      to.out_scale[i] = static_cast<A>(out_scale);
      da[i] = static_cast<A>(gu);
      if (d != nullptr) dd[i] = static_cast<A>(s.lam * gp);
      dlam += (d == nullptr ? 1.0 : static_cast<double>(d[i])) * gp + ge;
    }
    if (args.dnorm_weight != nullptr) small(args.dnorm_weight)[c] = static_cast<A>(dweight);
    if (args.dnorm_bias != nullptr) small(args.dnorm_bias)[c] = static_cast<A>(dbias);
    small(args.dlam)[c] = static_cast<A>(dlam);
  }

  // From da: dy +=, and the gradients of the two channel filters.
  void score_gradients(const A* y, const A* a, const A* da, A* dy) const {
    const int64_t taps = args.kernel_size, channels = shape.channels;
    std::vector<double> sums(static_cast<std::size_t>(2 * taps * shape.batch), 0.0);
    parallel_for(args.threads, shape.batch, [&](int64_t b) {
      thread_local Scratch scratch;
      A* line = scratch.template reserve<A>(4 * channels);
      double* to = sums.data() + 2 * taps * b;
      this->scores().backward(y + b * channels, a + b * channels, da + b * channels, line,
                              line + channels, line + 2 * channels, line + 3 * channels,
                              dy + b * channels, to, to + taps);
    });
    for (int64_t t = 0; t < taps; ++t) {
      double dq = 0, dk = 0;
      for (int64_t b = 0; b < shape.batch; ++b) {
        dq += sums[static_cast<std::size_t>(2 * taps * b + t)];
        dk += sums[static_cast<std::size_t>(2 * taps * b + taps + t)];
      }
      small(args.dq_weight)[t] = static_cast<A>(dq);
      small(args.dk_weight)[t] = static_cast<A>(dk);
    }
  }

  // Backward of the two cell evaluations: the gate's, then the step's own. grad_state is that of
  // the new state and collects the gate's share.
  void cell_gradients(const A* y, const A* pooled_p, const A* state, const A* d, A* dd, A* dy,
                      A* dpooled_p, A* grad_state) const {
    A* dparams[kMaxCellParams] = {};
    for (std::size_t i = 0; i < args.dcell_params.size(); ++i) {
      dparams[i] = small(args.dcell_params[i]);
    }
    if (this->gated()) {
      if (args.sigmoid_gate)
        for (int64_t i = 0; i < planes; ++i) dd[i] *= d[i] * (A(1) - d[i]);
      cell_backward<A>(this->cell, pooled_p, state, args.first_sample, shape.batch, dd, true,
                       dpooled_p, grad_state, dparams, args.threads);
    }
    cell_backward<A>(this->cell, y, small(args.state), false, shape.batch, grad_state, false, dy,
                     small(args.dstate), dparams, args.threads);
  }

  void weight_gradients(const A* partial, int64_t batch_units) const {
    const int64_t channels = shape.channels;
    this->for_channels([&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        for (int64_t tap = 0; tap < 18; ++tap) {
          double total = 0;
          for (int64_t unit = 0; unit < batch_units; ++unit)
            total += partial[(unit * 18 + tap) * channels + c];
          if (tap < 9)
            small(args.dv_weight)[c * 9 + tap] = static_cast<A>(total);
          else if (args.dprev_weight != nullptr)
            small(args.dprev_weight)[c * 9 + tap - 9] =
                static_cast<A>(total * static_cast<double>(small(args.lam)[c]));
        }
      }
    });
  }

  void run() const {
    const int64_t channels = shape.channels, slots = this->slots();
    const Units<A> units(grid);
    const int64_t partial_size = units.batch_units * 18 * channels;
    const int64_t table_size = PlaneTable<A>::elements(shape);
    Buffers<A> buffers(table_size + (7 + 2 * slots) * planes + 2 * channels + partial_size);
    const PlaneTable<A> table(buffers.take(table_size), shape);
    A *a = buffers.take(planes), *d = buffers.take(planes), *da = buffers.take(planes);
    A *dd = buffers.take(planes), *out_scale = buffers.take(planes);
    A *dy = buffers.take(2 * planes), *dpooled_p = dy + planes;
    A *state = buffers.take(slots * planes), *grad_state = buffers.take(slots * planes);
    const Coefficients to{out_scale, buffers.take(channels), buffers.take(channels)};
    A* partial = buffers.take(partial_size);
    const A *y = small(args.pooled), *pooled_p = y + planes;
    if (!this->gated()) d = nullptr;

    this->moments(table, args.grad_out, args.grad_o, nullptr);
    this->attend(y, pooled_p, state, a, d);
    channel_gradients(table, a, d, to, da, dd);
    std::fill_n(dy, 2 * planes, A(0));
    score_gradients(y, a, da, dy);
    if (this->dynamic()) {
      if (args.grad_state != nullptr)
        std::copy_n(small(args.grad_state), slots * planes, grad_state);
      else
        std::fill_n(grad_state, slots * planes, A(0));
      cell_gradients(y, pooled_p, state, d, dd, dy, dpooled_p, grad_state);
    }
    const A scale = A(1) / static_cast<A>(shape.pixels());
    for (int64_t i = 0; i < 2 * planes; ++i) dy[i] *= scale;

    const bool through_norm = args.norm == Norm::batch;
    run_pass<GradientsPass>(
        args.threads, this->grid, this->feature(args.x), this->feature(args.p),
        this->feature(args.grad_out), this->feature(args.grad_o), this->feature(args.dx),
        this->feature(args.dp), this->mixture(a, d), out_scale,
        through_norm ? to.o_scale : nullptr, through_norm ? to.offset : nullptr, dy, dpooled_p,
        args.residual, args.join, partial);
    weight_gradients(partial, units.batch_units);
  }
};

}  // namespace

void light_attention_forward(const LightAttentionForward& args) {
  args.dtype == DType::f64 ? ForwardStep<double>(args).run() : ForwardStep<float>(args).run();
}

void light_attention_backward(const LightAttentionBackward& args) {
  args.dtype == DType::f64 ? BackwardStep<double>(args).run() : BackwardStep<float>(args).run();
}

}  // namespace dla::DLA_ISA
