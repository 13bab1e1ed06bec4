//! A band of an image streams through the network: panel by panel of its columns, and in a panel step by
//! step of its rows, which pass through all works one after the other. What a work writes is read by the
//! next one while it is in the cache, no pixel is computed twice, and memory grows with the height alone,
//! by what a panel leaves to the next one on its edge.
//!
//! For that, every work lags behind the one before, up and to the left, by the halo that it reads: the
//! panels and steps of the last works lean over the borders of the image.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::layers::{Conv, Layer};
use super::rings::{Edge, Extents, Ring, Shared, SharedEdge};
use super::schedule::{Schedule, Turn};
use super::{NetError, Network};
use crate::kernels::blocked::{First, GateWeights, Gated, Last, Row, Sink, padding};
use crate::kernels::winograd::{Convolve, TILE};
use crate::ops::scratch::Scratch;
use crate::parallel::{self, Threads};
use crate::simd;

/// Rows of a step: whole tiles of the convolutions and, of 3 or 4 rows, of the gates.
pub(super) const STEP: usize = 3 * TILE;
/// The widest image of a single panel: several have narrower ones among them, as each work lags.
const WHOLE: usize = 128;
/// From one question whether to go on to the next.
const PAUSE: Duration = Duration::from_millis(100);
/// More than there are threads.
const WORKERS: usize = 1024;

/// Columns of a panel, of which a step has whole register tiles. What a work reads and writes of 48 fits a
/// second-level cache of 1 MiB: 32 and 80 columns take 1.02 and 1.03 times as long with the DnCNN of 17
/// convolutions at 321 × 481, steps of 8 and 24 rows 1.00 and 1.04 times (Zen 5, one thread). Where it is
/// larger, fewer and wider panels read the weights less often: 96 columns take 0.94 times as long there as 48,
/// 64 0.97, 144 1.00 (an Intel Xeon with 2 MiB).
fn side(width: usize) -> usize {
    match width {
        0..=WHOLE => width,
        _ if simd::has_large_second_level_cache() => 96,
        _ => 48,
    }
}

/// What is done to the rows of an image on their way.
#[derive(Clone, Copy)]
enum Work<'a> {
    Convolve(&'a Layer),
    Gate(&'a GateWeights),
    /// The last convolution, and its sum with the image.
    Finish,
}

/// Works in their order: each reads what the one before writes.
fn works(network: &Network) -> Vec<Work<'_>> {
    let of = |layer| [Some(Work::Convolve(layer)), layer.unit.as_ref().map(Work::Gate)];
    network.layers.iter().flat_map(of).flatten().chain([Work::Finish]).collect()
}

impl Work<'_> {
    /// Rows and columns around an output that it reads.
    fn halo(&self, network: &Network) -> usize {
        match self {
            Work::Convolve(_) => 1,
            Work::Gate(unit) => unit.k() / 2,
            Work::Finish => network.tail.k() / 2,
        }
    }

    /// Rows and columns by which it lags behind the work before: whole tiles, so that they are the same
    /// wherever panels and bands begin.
    fn lag(&self, network: &Network) -> usize {
        self.halo(network).next_multiple_of(TILE)
    }

    /// Channels of what it writes.
    fn outputs(&self, before: usize) -> usize {
        match self {
            Work::Convolve(layer) => layer.conv.outputs(),
            Work::Gate(_) | Work::Finish => before,
        }
    }
}

/// The extents of what is kept between each work and the next one, of a panel of so many columns.
fn extents(network: &Network, side: usize) -> Vec<Extents> {
    let lanes = simd::selected_lanes::<f32>();
    let mut channels = 0;
    let between = |pair: &[Work<'_>]| {
        channels = pair[0].outputs(channels);
        let (halo, lag) = (pair[1].halo(network), pair[1].lag(network));
        Extents {
            // The reader is done with the step before when the writer begins one.
            rows: STEP + lag + halo,
            lead: lag + halo,
            pixels: side,
            // Tiles reach over the end.
            trail: halo + TILE - 1,
            blocks: channels.div_ceil(lanes),
            lanes,
        }
    };
    works(network).windows(2).map(between).collect()
}

/// The bytes that a band of so many columns takes for each of its rows.
pub(super) fn bytes_per_row(network: &Network, width: usize) -> usize {
    let edges = extents(network, side(width)).iter().map(Extents::edge).sum::<usize>();
    if width <= WHOLE { 0 } else { edges * size_of::<f32>() }
}

/// The rows above and below a band that its results depend on in every bit: the outputs of a tile are
/// sums of all its inputs, of which some cancel but for their rounding.
pub(super) fn reach(network: &Network) -> usize {
    let reach = works(network).iter().rev().fold(0_usize, |reach, work| match work {
        Work::Convolve(layer) if matches!(layer.conv, Conv::Dense(_)) => {
            reach.next_multiple_of(TILE) + 1
        }
        Work::Convolve(_) | Work::Finish => reach + work.halo(network),
        // Tiles of a gate have 4 rows at most.
        Work::Gate(_) => reach + TILE - 1 + work.halo(network),
    });
    // The tiles of the first step may be others.
    (reach + STEP).next_multiple_of(STEP)
}

/// What a band takes, for the next one: most of what fresh memory costs is that the system clears it page
/// by page.
#[derive(Debug, Default)]
pub(super) struct Spare {
    extents: Vec<Extents>,
    /// For each panel that is worked on, after each work but the last.
    rings: Vec<Vec<Ring>>,
    /// Rows of the edges.
    rows: usize,
    /// After each work but the last; none before there are several panels.
    edges: Vec<Edge>,
}

/// The most bytes that are kept from one band to the next, and that the rings of all threads take.
const KEPT: usize = 128 << 20;

impl Spare {
    fn of(network: &Network) -> MutexGuard<'_, Option<Self>> {
        network.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Grows to rings for so many panels and edges of so many rows.
    fn grow(&mut self, live: usize, rows: usize) {
        while self.rings.len() < live {
            self.rings.push(Ring::several(&self.extents));
        }
        if rows > self.rows {
            self.edges = Edge::several(rows, &self.extents);
            self.rows = rows;
        }
    }

    fn bytes(&self) -> usize {
        let of = |e: &Extents| self.rings.len() * e.ring() + self.rows * e.edge();
        self.extents.iter().map(of).sum::<usize>() * size_of::<f32>()
    }
}

/// Rows of an image: those to yield, and those to compute them from.
pub(super) struct Band {
    pub(super) core: Range<usize>,
    pub(super) region: Range<usize>,
}

/// An image, (channels, height, width), and where its result goes.
pub(super) struct Job<'a> {
    pub(super) image: &'a [f32],
    pub(super) shape: [usize; 3],
    pub(super) clean: &'a mut [f32],
    pub(super) threads: Threads,
}

impl Job<'_> {
    /// Computes a band. Tells `goes_on` the share that is done, and stops if it says so.
    pub(super) fn band(
        &mut self,
        network: &Network,
        band: &Band,
        mut goes_on: impl FnMut(f64) -> bool,
    ) -> Result<(), NetError> {
        let (works, extents) = (works(network), extents(network, side(self.shape[2])));
        let plan = Plan::new(network, &works, [band.region.len(), self.shape[2]]);
        let per_panel = extents.iter().map(Extents::ring).sum::<usize>() * size_of::<f32>();
        let live = self.threads.count().min(KEPT / per_panel).clamp(1, plan.panels);
        let spare = Spare::of(network).take().filter(|spare| spare.extents == extents);
        let mut spare = spare.unwrap_or_else(|| Spare { extents, ..Spare::default() });
        spare.grow(live, if plan.panels > 1 { plan.height } else { 0 });
        let height = plan.height;
        let flow = Flow {
            network,
            band,
            image: self.image,
            shape: self.shape,
            clean: Mutex::new(&mut *self.clean),
            rings: (spare.rings.iter_mut().take(live))
                .map(|rings| rings.iter_mut().map(|ring| ring.share(height)).collect())
                .collect(),
            edges: spare.edges.iter_mut().map(Edge::share).collect(),
            state: Mutex::new(State {
                schedule: Schedule::new(works.len(), plan.panels, plan.steps, live),
                until: Instant::now(),
                failed: false,
            }),
            news: Condvar::new(),
            works,
            plan,
        };
        loop {
            flow.state().until = Instant::now() + PAUSE;
            parallel::for_each(self.threads, WORKERS, |_| flow.work());
            if !goes_on(flow.state().schedule.share()) {
                return Err(NetError::Stopped);
            }
            if flow.state().schedule.is_over() {
                break;
            }
        }
        drop(flow);
        if spare.bytes() <= KEPT {
            *Spare::of(network) = Some(spare);
        }
        Ok(())
    }
}

/// Which rows and columns belong to a step and a panel of a work.
struct Plan {
    side: usize,
    height: usize,
    width: usize,
    panels: usize,
    steps: usize,
    /// How far each work lags behind the first one.
    lags: Vec<usize>,
}

impl Plan {
    fn new(network: &Network, works: &[Work<'_>], [height, width]: [usize; 2]) -> Self {
        let mut lag = 0;
        let lags: Vec<_> = (works.iter().enumerate())
            .map(|(i, work)| {
                lag += if i == 0 { 0 } else { work.lag(network) };
                lag
            })
            .collect();
        let side = side(width);
        let panels = if width <= WHOLE { 1 } else { (width + lag).div_ceil(side) };
        Self { side, height, width, panels, steps: (height + lag).div_ceil(STEP), lags }
    }

    fn rows(&self, work: usize, step: usize) -> Range<usize> {
        let edge = |i: usize| (i * STEP).saturating_sub(self.lags[work]).min(self.height);
        edge(step)..edge(step + 1)
    }

    fn columns(&self, work: usize, panel: usize) -> Range<usize> {
        if self.panels == 1 {
            return 0..self.width;
        }
        let edge = |i: usize| (i * self.side).saturating_sub(self.lags[work]).min(self.width);
        edge(panel)..edge(panel + 1)
    }
}

struct State {
    schedule: Schedule,
    /// When to take no more tasks, and pause.
    until: Instant,
    failed: bool,
}

/// A band at work.
struct Flow<'a> {
    network: &'a Network,
    band: &'a Band,
    image: &'a [f32],
    shape: [usize; 3],
    clean: Mutex<&'a mut [f32]>,
    works: Vec<Work<'a>>,
    plan: Plan,
    /// Panels take them in turn.
    rings: Vec<Vec<Shared<'a>>>,
    edges: Vec<SharedEdge<'a>>,
    state: Mutex<State>,
    /// A task is complete, or something failed.
    news: Condvar,
}

/// A turn, and the rows and columns that it writes.
struct Task<'t, 'a> {
    flow: &'t Flow<'a>,
    turn: Turn,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Drop for Task<'_, '_> {
    /// The task is complete, or panicked.
    fn drop(&mut self) {
        let mut state = self.flow.state();
        state.failed |= std::thread::panicking();
        state.schedule.complete(self.turn);
        self.flow.news.notify_all();
    }
}

impl<'a> Flow<'a> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn task(&self, turn: Turn) -> Task<'_, 'a> {
        let rows = self.plan.rows(turn.work, turn.step);
        let columns = self.plan.columns(turn.work, turn.panel);
        Task { flow: self, turn, rows, columns }
    }

    /// Works on tasks until there are no more, or it is time to pause.
    fn work(&self) {
        let mut home = None;
        let mut state = self.state();
        while !state.failed && Instant::now() < state.until {
            if let Some(turn) = state.schedule.take(&mut home) {
                drop(state);
                let task = self.task(turn);
                // SAFETY: the schedule gives a turn away once, when it can be taken.
                unsafe { task.run() };
                drop(task);
                state = self.state();
            } else if state.schedule.is_busy() {
                state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                break;
            }
        }
        state.schedule.leave(home);
    }
}

impl Task<'_, '_> {
    /// # Safety
    /// The turn must be one that [`Schedule::take`] gave, and run once. Then tasks write different rows of a ring
    /// or an edge, or different rings, into slots of rows that nobody needs any more, and what they read is
    /// complete.
    unsafe fn run(&self) {
        let Flow { ref works, ref plan, ref edges, .. } = *self.flow;
        if self.rows.is_empty() {
            return;
        }
        let (rows, pixels) = (|| self.rows.clone(), self.columns.len());
        // SAFETY: the caller's promise.
        unsafe {
            if self.turn.work + 1 < works.len() {
                let edge = (self.turn.panel > 0).then(|| edges[self.turn.work]);
                let ends = self.columns.end == plan.width;
                self.after().surround(rows(), pixels, edge, ends);
            }
            if pixels > 0 {
                match works[self.turn.work] {
                    Work::Convolve(layer) => self.convolve(layer),
                    Work::Gate(unit) => self.gate(unit),
                    Work::Finish => self.finish(),
                }
            }
            if self.turn.work + 1 < works.len() && self.turn.panel + 1 < plan.panels {
                self.after().leave(rows(), pixels, edges[self.turn.work]);
            }
        }
    }

    /// What this work is to write.
    fn after(&self) -> Shared<'_> {
        self.flow.rings[self.turn.panel % self.flow.rings.len()][self.turn.work]
    }

    /// Row `y` of what the work before wrote, from `halo` pixels ahead of the first one on.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn before(&self, y: isize, halo: usize) -> Row<'_> {
        let ring = self.flow.rings[self.turn.panel % self.flow.rings.len()][self.turn.work - 1];
        let start = self.flow.plan.columns(self.turn.work - 1, self.turn.panel).start;
        // SAFETY: the caller's promise.
        unsafe { ring.row(y, start - self.columns.start + halo) }
    }

    /// Rows of a convolution.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn convolve(&self, layer: &Layer) {
        // SAFETY: the caller's promise.
        let x = unsafe { self.after().rows_mut(self.rows.clone()) };
        let relu = layer.unit.is_none();
        let pixels = self.columns.len();
        match &layer.conv {
            Conv::Dense(weights) => {
                let tiles = x.len().div_ceil(TILE) * pixels.div_ceil(TILE);
                let mut scratch = Scratch::new(weights.scratch(tiles));
                let first = self.rows.start as isize - 1;
                // SAFETY: nobody writes to these pixels of the input.
                let row = |y| unsafe { self.before(first + y as isize, 1) };
                simd::dispatch(Convolve {
                    weights,
                    rows: &(0..x.len().next_multiple_of(TILE) + 2).map(row).collect::<Vec<_>>(),
                    pixels,
                    scratch: &mut scratch,
                    sink: Sink { rows: &x, relu },
                });
            }
            Conv::First(weights) => {
                let k = weights.k();
                let patch = self.patch(k / 2);
                let (height, width) = (x.len() + k - 1, pixels + k - 1);
                for y in 0..x.len() {
                    let rows: Vec<_> = (0..weights.inputs() * k)
                        .map(|i| &patch[(i / k * height + y + i % k) * width..][..width])
                        .collect();
                    let sink = Sink { rows: &x[y..y + 1], relu };
                    simd::dispatch(First { weights, rows: &rows, pixels, sink });
                }
            }
        }
    }

    /// The pixels of the image that are read, (channels, rows, columns), with what comes ahead of the
    /// network and zeros around the image.
    fn patch(&self, halo: usize) -> Scratch<f32> {
        let Flow { image, shape: [channels, full, width], band, network, .. } = *self.flow;
        let (rows, columns) = (self.rows.len() + 2 * halo, self.columns.len() + 2 * halo);
        let mut patch = Scratch::new(channels * rows * columns);
        patch.fill(0.0);
        let left = halo.saturating_sub(self.columns.start);
        let start = (self.columns.start + left).saturating_sub(halo);
        let end = (self.columns.end + halo).min(width);
        for (i, out) in patch.chunks_exact_mut(columns).enumerate() {
            let (plane, y) = (i / rows, (self.rows.start + i % rows).wrapping_sub(halo));
            if y < band.region.len() {
                let row = &image[(plane * full + band.region.start + y) * width..][start..end];
                let (scale, shift) = network.before.of(plane);
                for (out, &x) in out[left..].iter_mut().zip(row) {
                    *out = scale * x + shift;
                }
            }
        }
        patch
    }

    /// Gates rows of a unit.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn gate(&self, weights: &GateWeights) {
        let (halo, pixels) = (weights.k() / 2, self.columns.len());
        let lanes = simd::selected_lanes::<f32>();
        let mut scratch = Scratch::new(weights.scratch(self.rows.len(), pixels, lanes));
        let Plan { height, width, .. } = self.flow.plan;
        // The zeros of the ring, or those that the gate must put there itself.
        let ((top, bottom), (left, right)) = match weights.keeps_zeros() {
            true => ((0, 0), (0, 0)),
            false => (padding(&self.rows, halo, height), padding(&self.columns, halo, width)),
        };
        let first = self.rows.start as isize + top as isize - halo as isize;
        let around = first..(self.rows.end + halo - bottom) as isize;
        // SAFETY: the caller's promise.
        unsafe {
            let row = |y, before| self.before(y, before);
            let out = self.after().rows_mut(self.rows.clone());
            simd::dispatch(Gated {
                weights,
                v: &around.map(|y| row(y, halo - left)).collect::<Vec<_>>(),
                x: &self.rows.clone().map(|y| row(y as isize, 0)).collect::<Vec<_>>(),
                padding: [top, bottom, left, right],
                pixels,
                out: &out,
                scratch: &mut scratch,
            });
        }
    }

    /// The last convolution, and its sum with the image.
    ///
    /// # Safety
    /// As [`Task::run`].
    unsafe fn finish(&self) {
        let Flow { image, shape: [_, full, width], band, network, ref clean, .. } = *self.flow;
        let (weights, sign, pixels) = (&network.tail, network.sign(), self.columns.len());
        let halo = weights.k() / 2;
        let mut out = Scratch::new(weights.outputs() * pixels);
        for y in self.rows.clone() {
            if !band.core.contains(&(band.region.start + y)) {
                continue;
            }
            let rows: Vec<_> = (0..weights.k())
                // SAFETY: nobody writes to these pixels meanwhile.
                .map(|i| unsafe { self.before((y + i) as isize - halo as isize, halo) })
                .collect();
            simd::dispatch(Last { weights, rows: &rows, out: &mut out });
            let mut clean = clean.lock().unwrap_or_else(PoisonError::into_inner);
            for (plane, out) in out.chunks_exact(pixels).enumerate() {
                let at = (plane * full + band.region.start + y) * width + self.columns.start;
                let pixels = clean[at..][..pixels].iter_mut().zip(&image[at..]);
                for ((clean, &x), &out) in pixels.zip(out) {
                    *clean = x + sign * out;
                }
            }
        }
    }
}
