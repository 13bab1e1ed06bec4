//! Who takes which step of which work in which panel, and when.
//!
//! Each thread has a panel of its own, its home, as long as there are enough. Without a task in it, it
//! takes one of another.

/// A step of a work in a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) panel: usize,
    pub(super) work: usize,
    pub(super) step: usize,
}

/// How far a work is in a panel.
#[derive(Clone, Copy, Debug, Default)]
struct Front {
    /// Steps.
    done: usize,
    /// Whether somebody is at the next one.
    busy: bool,
}

#[derive(Debug)]
pub(super) struct Schedule {
    works: usize,
    panels: usize,
    steps: usize,
    /// Panels that may be worked on at a time.
    live: usize,
    /// (panels, works)
    fronts: Vec<Front>,
    /// The first panel that is not complete, and the first that nobody has begun.
    oldest: usize,
    begun: usize,
    /// Panels that were somebody's home when it left.
    left: Vec<usize>,
}

impl Schedule {
    pub(super) fn new(works: usize, panels: usize, steps: usize, live: usize) -> Self {
        let fronts = vec![Front::default(); panels * works];
        Self { works, panels, steps, live, fronts, oldest: 0, begun: 0, left: Vec::new() }
    }

    /// A turn that can be taken now: in the panel at `home`, which is one that nobody has begun if there is
    /// one to have, or in another; as late in the network as there is one.
    pub(super) fn take(&mut self, home: &mut Option<usize>) -> Option<Turn> {
        *home = home.filter(|&panel| !self.is_complete(panel));
        // Others may have completed what somebody left.
        while home.is_none()
            && let Some(panel) = self.left.pop()
        {
            *home = Some(panel).filter(|&panel| !self.is_complete(panel));
        }
        if home.is_none() && self.begun < self.panels.min(self.oldest + self.live) {
            *home = Some(self.begun);
            self.begun += 1;
        }
        for panel in home.iter().copied().chain(self.oldest..self.begun) {
            for work in (0..self.works).rev() {
                if self.is_ready(panel, work) {
                    let front = &mut self.fronts[panel * self.works + work];
                    front.busy = true;
                    return Some(Turn { panel, work, step: front.done });
                }
            }
        }
        None
    }

    /// A turn that was taken is over.
    pub(super) fn complete(&mut self, Turn { panel, work, step }: Turn) {
        self.fronts[panel * self.works + work] = Front { done: step + 1, busy: false };
        while self.oldest < self.begun && self.is_complete(self.oldest) {
            self.oldest += 1;
        }
    }

    /// Somebody goes, whose home another may have.
    pub(super) fn leave(&mut self, home: Option<usize>) {
        self.left.extend(home);
    }

    /// Whether somebody is at a turn: others may follow.
    pub(super) fn is_busy(&self) -> bool {
        self.fronts.iter().any(|front| front.busy)
    }

    /// The share of all steps that are complete.
    pub(super) fn share(&self) -> f64 {
        let done = |panel| self.front(panel, self.works - 1).done;
        (0..self.panels).map(done).sum::<usize>() as f64 / (self.panels * self.steps) as f64
    }

    pub(super) fn is_over(&self) -> bool {
        self.oldest == self.panels
    }

    fn front(&self, panel: usize, work: usize) -> Front {
        self.fronts[panel * self.works + work]
    }

    fn is_complete(&self, panel: usize) -> bool {
        self.front(panel, self.works - 1).done == self.steps
    }

    /// Whether the next step of a work in a panel can be taken: the work before has come so far, the one
    /// after does not need the rows any more that will be overwritten, and the panel before has left its
    /// edge.
    fn is_ready(&self, panel: usize, work: usize) -> bool {
        let Front { done: step, busy } = self.front(panel, work);
        !busy
            && step < self.steps
            && (work == 0 || self.front(panel, work - 1).done > step)
            && (work + 1 == self.works || self.front(panel, work + 1).done >= step)
            && (panel == 0 || self.front(panel - 1, work).done > step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Threads come, take turns of any length, and go, in an arbitrary order.
    #[test]
    fn all_turns_come_once_and_in_order_whoever_comes_and_goes() {
        let mut seed = 1_u64;
        let mut random = |below: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % below
        };
        for _ in 0..2000 {
            let (works, panels) = (1 + random(6), 1 + random(6));
            let (steps, live) = (1 + random(5), 1 + random(4));
            let mut schedule = Schedule::new(works, panels, steps, live);
            let mut done = vec![0; panels * works];
            // Homes of those that are there, and what they are at.
            let mut threads: Vec<(Option<usize>, Option<Turn>)> = Vec::new();
            while !schedule.is_over() {
                if threads.is_empty() || threads.len() < 4 && random(4) == 0 {
                    threads.push((None, None));
                }
                let (mut home, turn) = threads.swap_remove(random(threads.len()));
                if let Some(turn) = turn {
                    let Turn { panel, work, step } = turn;
                    assert!(schedule.is_busy());
                    schedule.complete(turn);
                    done[panel * works + work] += 1;
                    assert_eq!(done[panel * works + work], step + 1);
                    threads.push((home, None));
                } else if random(6) == 0 {
                    schedule.leave(home);
                } else if let Some(turn) = schedule.take(&mut home) {
                    let Turn { panel, work, step } = turn;
                    let done = |panel: usize, work: usize| done[panel * works + work];
                    assert_eq!(step, done(panel, work));
                    assert!(work == 0 || done(panel, work - 1) > step);
                    assert!(work + 1 == works || done(panel, work + 1) >= step);
                    assert!(panel == 0 || done(panel - 1, work) > step);
                    // The rings are those of other panels no more.
                    assert!(panel < live || done(panel - live, works - 1) == steps);
                    threads.push((home, Some(turn)));
                } else {
                    // It waits, for which there must be somebody.
                    assert!(schedule.is_busy(), "{schedule:?}");
                    threads.push((home, None));
                }
            }
            assert!(done.iter().all(|&done| done == steps));
            assert_eq!(schedule.share(), 1.0);
        }
    }
}
