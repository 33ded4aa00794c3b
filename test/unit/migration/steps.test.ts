import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  type Direction,
  type Facts,
  type Next,
  nextStep,
  type StepName,
  type VolumeFacts,
} from '../../../src/migration/steps.js';

const SOURCES = ['running', 'migrating', 'pre-switchover', 'switching', 'sent', 'halted', 'absent'] as const;
const SOURCES_DEPARTED = [...SOURCES.map((source) => [source, false] as const), ['absent', true] as const];
const DESTINATIONS = ['absent', 'listed', 'incoming', 'ran'] as const;
const PROOF = { volumeId: 'x', generation: 5 };
const VOLUMES: VolumeFacts[] = (['plain', 'sealed', 'retired', 'other'] as const).flatMap((source) =>
  (['absent', 'standby', 'relocating', 'plain', 'other'] as const).flatMap((destination) =>
    [null, PROOF].map((proof) => ({ source, destination, proof })),
  ),
);

const BOTH = [true, false].flatMap((arrived) => [true, false].map((copied) => [arrived, copied] as const));
const BOTH_ARRIVED = BOTH.filter(([arrived]) => arrived);

/** Every combination with two volumes. */
function everyFact(act: (facts: Facts, direction: Direction, next: Next) => void): number {
  let count = 0;
  for (const [source, departed] of SOURCES_DEPARTED)
    for (const destination of DESTINATIONS)
      for (const claimed of [true, false])
        for (const [arrived, copiedAhead] of destination === 'ran' ? BOTH_ARRIVED : BOTH)
          for (const a of VOLUMES)
            for (const b of VOLUMES)
              for (const direction of ['forward', 'back'] as const) {
                const facts = {
                  source,
                  departed,
                  destination,
                  claimed,
                  arrived,
                  copiedAhead,
                  volumes: [a, b],
                };
                act(facts, direction, nextStep(facts, direction));
                count += 1;
              }
  return count;
}

const took = (volume: VolumeFacts): boolean =>
  volume.destination === 'relocating' || volume.destination === 'plain';

/** What must hold whenever a step is chosen. */
const ALLOWED: Partial<Record<StepName, (facts: Facts) => boolean>> = {
  'pre-copy': ({ source, destination, copiedAhead, claimed, volumes }) =>
    source === 'running' &&
    destination !== 'incoming' &&
    claimed &&
    !copiedAhead &&
    volumes.every((volume) => volume.source === 'plain' && volume.destination === 'standby'),
  seal: ({ source, volumes }) => source === 'pre-switchover' && !volumes.some(took),
  takeover: ({ source, volumes }) =>
    source === 'pre-switchover' &&
    volumes.every((volume) => volume.source === 'sealed' && volume.proof === null),
  continue: ({ source, destination, volumes }) =>
    source === 'pre-switchover' && destination === 'incoming' && volumes.every(took),
  unseal: ({ volumes, arrived }) =>
    !arrived &&
    volumes.every((volume) => volume.source !== 'sealed' || (volume.proof !== null && !took(volume))),
  discard: ({ arrived, volumes }) => !arrived && !volumes.some(took),
  'cancel-volumes': ({ arrived, volumes, destination }) =>
    !arrived && !volumes.some(took) && destination === 'absent',
  revive: ({ volumes, destination, arrived, claimed }) =>
    !arrived &&
    claimed &&
    destination === 'absent' &&
    volumes.every((volume) => volume.source !== 'sealed' && !took(volume)),
  retreat: ({ arrived, volumes }) => !arrived && volumes.some(took),
  depart: ({ arrived, volumes }) => arrived && volumes.every((volume) => volume.destination === 'plain'),
  retire: ({ arrived, source, departed, volumes }) =>
    arrived && source === 'absent' && departed && volumes.every((volume) => volume.destination === 'plain'),
};

describe('nextStep', () => {
  test('never chooses a step that its facts do not allow', () => {
    const seen = new Set<StepName>();
    const count = everyFact((facts, direction, next) => {
      if (next.kind !== 'step') return;
      seen.add(next.step);
      const allowed = ALLOWED[next.step]?.(facts) ?? true;
      assert.ok(allowed, `${direction}: ${next.step} with ${JSON.stringify(facts)}`);
    });
    assert.ok(count > 100_000);
    assert.equal(seen.size, 19, [...seen].join(', '));
  });

  test('never turns back once the guest ran at the destination, and never forward before', () => {
    everyFact((facts, direction, next) => {
      if (facts.arrived) assert.notEqual(next.kind, 'turn-back');
      else assert.notEqual(next.kind, 'turn-forward');
      if (facts.arrived && direction === 'back') assert.equal(next.kind, 'turn-forward');
    });
  });

  test('is done only with one side clean', () => {
    everyFact(({ volumes, arrived, claimed, source, destination }, direction, next) => {
      if (next.kind !== 'done') return;
      assert.equal(claimed, false);
      if (direction === 'forward') {
        assert.ok(arrived && source === 'absent');
        assert.ok(volumes.every((volume) => volume.source === 'retired' && volume.destination === 'plain'));
      } else {
        assert.ok(!arrived && destination === 'absent');
        assert.ok(volumes.every((volume) => volume.source === 'plain' && volume.destination === 'absent'));
      }
    });
  });
});
