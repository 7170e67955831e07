import type { MapSenseResponse } from "backpack-serving-client/backpack_proto/v1/inference";
import { useEffect, useRef, useState } from "preact/hooks";
import { go } from "../../address";
import { visible } from "../../parts/words";
import { edges, layout, zero } from "./layout";

const HIGHEST = 520;

/** The map as points. It is a picture: what it says is in the table below it, where the keyboard reaches. */
export function MapPicture({ found: { words }, sense }: { found: MapSenseResponse; sense: string }) {
  const frame = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.floor(entry!.contentRect.width)));
    watch.observe(frame.current!);
    return () => watch.disconnect();
  }, []);
  const height = Math.min(HIGHEST, Math.max(260, width * 0.66));
  const labels = words.map(({ token }) => visible(token!.text.trim() || token!.text));
  const places = layout(
    words.map(({ x, y }, at) => ({ x, y, letters: labels[at]!.length })),
    width,
    height,
  );
  const { across, up } = edges(width, height);
  const [upright, level] = [
    zero(
      words.map(({ x }) => x),
      ...across,
    ),
    zero(
      words.map(({ y }) => y),
      ...up,
    ),
  ];
  return (
    <div class="map" ref={frame}>
      {width > 0 && (
        <svg
          width={width}
          height={height}
          role="img"
          aria-label={`Sense ${sense} of ${words.length} words, by the figures of the table below`}
        >
          {upright !== undefined && <line class="zero" x1={upright} x2={upright} y1={0} y2={height} />}
          {level !== undefined && <line class="zero" x1={0} x2={width} y1={level} y2={level} />}
          {words.map(({ token, edited }, at) => {
            const { x, y, label } = places[at]!;
            const open = () => go("words", { word: token!.text, token: String(token!.id), sense });
            return (
              <g key={token!.id} class={edited ? "point edited" : "point"} onClick={open}>
                <title>{labels[at]}</title>
                <circle cx={x} cy={y} r={4} />
                {label && (
                  <text x={label.x} y={label.y} dominant-baseline="middle">
                    {labels[at]}
                  </text>
                )}
              </g>
            );
          })}
        </svg>
      )}
    </div>
  );
}
