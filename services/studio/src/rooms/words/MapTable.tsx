import type { MapAxis, MapSenseResponse } from "backpack-serving-client/backpack_proto/v1/inference";
import { link } from "../../address";
import { ServedBy } from "../../parts/ServedBy";
import { TokenList } from "../../parts/TokenList";
import { signed, visible } from "../../parts/words";
import { MapPicture } from "./MapPicture";

/** The map, what its axes speak for, and the same as figures. */
export function MapTable({ found, sense, toward }: { found: MapSenseResponse; sense: string; toward: string }) {
  const words = found.words.toSorted((one, other) => other.x - one.x);
  return (
    <>
      <MapPicture found={found} sense={sense} />
      <div class="axes">
        <Axis name="Rightwards" axis={found.x!} what={toward && `x is what the sense adds to ${toward}`} />
        <Axis name="Upwards" axis={found.y!} what="" />
      </div>
      <div class="scroll" tabIndex={0} role="region" aria-label="Words of the map">
        <table>
          <caption>
            From right to left on the map
            {words.some(({ edited }) => edited) && "; what the release edits is orange there"}.
          </caption>
          <thead>
            <tr>
              <th scope="col">word</th>
              <th scope="col" class="figure">
                x
              </th>
              <th scope="col" class="figure">
                y
              </th>
              <th scope="col" class="figure">
                norm
              </th>
            </tr>
          </thead>
          <tbody>
            {words.map(({ token, x, y, norm, edited }) => (
              <tr key={token!.id}>
                <td>
                  <a href={link("words", { word: token!.text, token: String(token!.id), sense })}>
                    <code>{visible(token!.text)}</code>
                  </a>{" "}
                  {edited && <span class="tag">edited</span>}
                </td>
                <td class="figure">{signed(x)}</td>
                <td class="figure">{signed(y)}</td>
                <td class="figure">{norm.toFixed(2)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <ServedBy served={found.served!} />
    </>
  );
}

function Axis({ name, axis, what }: { name: string; axis: MapAxis; what: string }) {
  return (
    <section>
      <h2>
        {name} <span class="quiet">{(100 * axis.share).toFixed(0)} % of the variance</span>
      </h2>
      {what && <p class="hint">{what}.</p>}
      <dl>
        <dt>speaks for</dt>
        <dd>
          <TokenList label={`${name}, speaks for`} tokens={axis.positive} />
        </dd>
        <dt>the other way for</dt>
        <dd>
          <TokenList label={`${name}, the other way for`} tokens={axis.negative} />
        </dd>
      </dl>
    </section>
  );
}
